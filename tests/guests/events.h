/* Xen's hypercalls and event channels, as a system with Xen's drivers uses them (xen/include/public: event_channel.h, physdev.h,
 * hvm/hvm_op.h, hvm/params.h, memory.h, arch-x86/cpuid.h). */

enum { HYPERCALL_PAGE = 0x80000, SHARED_INFO = 0x81000, EVENT_VECTOR = 0x50 };
enum { MEMORY_OP = 12, XEN_VERSION = 17, EVENT_CHANNEL_OP = 32, PHYSDEV_OP = 33, HVM_OP = 34 };
enum { ADD_TO_PHYSMAP = 7, GET_FEATURES = 6, SET_PARAM = 0, BIND_PIRQ = 2, CLOSE = 3, UNMASK = 9, EOI = 12, GET_FREE_PIRQ = 23 };
enum { DOMID_SELF = 0x7ff0, PORTS = 1024 };

/* What a 32-bit guest shares with Xen: 32 vCPUs of 64 bytes, then a bit for each port. */
static volatile u8 *const upcall_pending = (volatile u8 *)SHARED_INFO;
static volatile u32 *const selected = (volatile u32 *)(SHARED_INFO + 4);
static volatile u32 *const pending = (volatile u32 *)(SHARED_INFO + 0x800);
static volatile u32 *const masked = (volatile u32 *)(SHARED_INFO + 0x880);

static volatile u32 events[PORTS];
static u32 pirqs[PORTS];
static int uses_xen;

static u32 hypercall(u32 number, u32 first, void *second)
{
	u32 result;
	__asm__ volatile("call *%%eax"
			 : "=a"(result), "+b"(first), "+c"(second)
			 : "0"(HYPERCALL_PAGE + 32 * number)
			 : "edx", "esi", "edi", "memory");
	return result;
}

static u32 exchange(volatile u32 *place, u32 value)
{
	__asm__ volatile("xchgl %0, %1" : "+r"(value), "+m"(*place) :: "memory");
	return value;
}

static void change_bit(volatile u32 *bits, u32 index, int set)
{
	if (set) {
		__asm__ volatile("lock btsl %1, %0" : "+m"(bits[index / 32]) : "r"(index % 32) : "memory");
	} else {
		__asm__ volatile("lock btrl %1, %0" : "+m"(bits[index / 32]) : "r"(index % 32) : "memory");
	}
}

/* Each event is counted, and Xen gets the end of its interrupt. */
static void take_events(void)
{
	*upcall_pending = 0;
	u32 words = exchange(selected, 0);
	for (u32 word = 0; word < 32; word++) {
		if (!(words >> word & 1)) {
			continue;
		}
		u32 bits = pending[word] & ~masked[word];
		for (u32 bit = 0; bit < 32; bit++) {
			u32 port = 32 * word + bit;
			if (!(bits >> bit & 1)) {
				continue;
			}
			change_bit(pending, port, 0);
			events[port]++;
			if (pirqs[port]) {
				hypercall(PHYSDEV_OP, EOI, &pirqs[port]);
			}
		}
	}
}

/* The features that Xen offers, 0 where there is no Xen. */
static u32 set_up_xen(void)
{
	u32 leaf, a, b, c, d;
	for (leaf = 0x40000000; leaf < 0x40010000; leaf += 0x100) {
		__asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "0"(leaf));
		/* XenVMMXenVMM */
		if (b == 0x566e6558 && c == 0x65584d4d && d == 0x4d4d566e) {
			break;
		}
	}
	if (leaf == 0x40010000) {
		return 0;
	}
	__asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "0"(leaf + 2));
	__asm__ volatile("wrmsr" :: "c"(b), "a"(HYPERCALL_PAGE), "d"(0) : "memory");
	struct { u16 domain, size; u32 space, index, frame; } shared = { DOMID_SELF, 0, 0, 0, SHARED_INFO >> 12 };
	struct { u16 domain, pad; u32 index; u64 value; } callback = { DOMID_SELF, 0, 0, 2ull << 56 | EVENT_VECTOR };
	struct { u32 index, bits; } features = { 0, 0 };
	uses_xen = 1;
	if (hypercall(MEMORY_OP, ADD_TO_PHYSMAP, &shared) || hypercall(HVM_OP, SET_PARAM, &callback)
	    || hypercall(XEN_VERSION, GET_FEATURES, &features)) {
		return 0;
	}
	return features.bits;
}

/* A number for the interrupt of a message, or Xen's error. */
static u32 free_pirq(void)
{
	struct { u32 type, pirq; } free = { 0, 0 };
	u32 error = hypercall(PHYSDEV_OP, GET_FREE_PIRQ, &free);
	return error ? error : free.pirq;
}

/* The port of an event channel for an interrupt, or Xen's error. */
static u32 bind_pirq(u32 pirq)
{
	struct { u32 pirq, flags, port; } bind = { pirq, 0, 0 };
	u32 error = hypercall(EVENT_CHANNEL_OP, BIND_PIRQ, &bind);
	if (error) {
		return error;
	}
	pirqs[bind.port % PORTS] = pirq;
	return bind.port;
}

static u32 close_port(u32 port)
{
	pirqs[port % PORTS] = 0;
	return hypercall(EVENT_CHANNEL_OP, CLOSE, &port);
}

static u32 unmask_port(u32 port)
{
	return hypercall(EVENT_CHANNEL_OP, UNMASK, &port);
}
