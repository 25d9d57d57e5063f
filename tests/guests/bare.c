/* A guest without an operating system: carries out orders from its first serial port, one line after the other, and answers
 * each with a line. It knows nothing of PCI beyond the two ways to config space. Numbers are hexadecimal.
 *
 *   slot N          the device on bus 0 that the following is about
 *   ecam ADDRESS    where extended config space is
 *   r AT SIZE       reads config space through ports CF8 and CFC to CFF
 *   w AT SIZE V     writes it
 *   e AT SIZE       reads it through the ECAM window
 *   f AT SIZE V     writes it
 *   edump SIZE      the 4,096 bytes that the ECAM window shows, read in pieces of this size: 32 bytes a line to port E9, which
 *                   'xl dmesg' shows
 *   same            compares both ways, at every offset and size: the number of reads that differ
 *   spare AT MASK   bits of a byte of config space that the following never sets
 *   sum SIZE        reads the 256 bytes that CF8 reaches, at every offset, aligned or not: a hash of what was read
 *   sweep CLASS SIZE  likewise, but writes each and reads it again: zeros, ones, the complement, alternating bits, what was read
 *   esum SIZE, esweep CLASS SIZE  the same through the ECAM window, aligned: 4,096 bytes by dwords, 512 bytes otherwise
 *   loop N          reads the header N times: the number of reads that differ from the first
 *   repeat AT N     reads a dword N times, and writes CF8 before each, as systems do: the number of reads that differ from the first
 *   reread AT N     likewise, but writes CF8 only once
 *   m ADDRESS SIZE  reads memory
 *   n ADDRESS SIZE V  writes it
 *   m8 ADDRESS      reads eight bytes at once
 *   n8 ADDRESS HIGH LOW  writes them
 *   copy ADDRESS N  copies N dwords by one string instruction from there to 2 MiB, where the guest has nothing else: their sum
 *   i PORT SIZE     reads an I/O port
 *   o PORT SIZE V   writes it
 *   count V         how many interrupts came by vector 40 to 4f
 *   twice           how many interrupts the emulator delivered a second time
 *   ipi V N         sends itself N interrupts by vector 40 to 4f, one after the other: how many came
 *   end V ADDRESS SIZE W  what ends an interrupt that came by this vector: memory that is written before the end of interrupt
 *   xen             gets ready for hypercalls and events: the features that Xen offers (XENVER_get_features)
 *   pirq            a free physical interrupt for a message; Xen's error is a number from fffff000 on, here and below
 *   bind PIRQ       the port of an event channel for it
 *   close PORT      closes that
 *   events PORT     how many events came by it
 *   emask PORT      keeps events from coming
 *   eunmask PORT    lets them come, also the one that waits
 *   cr2 V           writes the register of page faults' addresses, CR2, and reads it
 *   pic             lets interrupts of the two 8259 come, by vectors 40 to 4f
 *   acpi            likewise, and lets ACPI report devices that come and are to go
 *   hotplugs        how many times it did
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static u32 in(u32 port, u32 size)
{
	u8 byte;
	u16 word;
	u32 dword;
	switch (size) {
	case 1: __asm__ volatile("inb %w1, %0" : "=a"(byte) : "Nd"(port)); return byte;
	case 2: __asm__ volatile("inw %w1, %0" : "=a"(word) : "Nd"(port)); return word;
	default: __asm__ volatile("inl %w1, %0" : "=a"(dword) : "Nd"(port)); return dword;
	}
}

static void out(u32 port, u32 size, u32 value)
{
	switch (size) {
	case 1: __asm__ volatile("outb %b0, %w1" :: "a"(value), "Nd"(port)); break;
	case 2: __asm__ volatile("outw %w0, %w1" :: "a"(value), "Nd"(port)); break;
	default: __asm__ volatile("outl %0, %w1" :: "a"(value), "Nd"(port)); break;
	}
}

static u32 load(u32 address, u32 size)
{
	switch (size) {
	case 1: return *(volatile u8 *)address;
	case 2: return *(volatile u16 *)address;
	default: return *(volatile u32 *)address;
	}
}

static void store(u32 address, u32 size, u32 value)
{
	switch (size) {
	case 1: *(volatile u8 *)address = value; break;
	case 2: *(volatile u16 *)address = value; break;
	default: *(volatile u32 *)address = value; break;
	}
}

/* One access of eight bytes, for which a 32-bit processor has its MMX registers. */
static u64 load_long(u32 address)
{
	u64 value;
	__asm__ volatile("movq (%1), %%mm0; movq %%mm0, %0; emms" : "=m"(value) : "r"(address) : "memory");
	return value;
}

static void store_long(u32 address, u64 value)
{
	__asm__ volatile("movq %1, %%mm0; movq %%mm0, (%0); emms" :: "r"(address), "m"(value) : "memory");
}

static u32 copied(u32 address, u32 count)
{
	u32 *copy = (u32 *)(2 << 20), *to = copy, left = count, sum = 0;
	__asm__ volatile("cld; rep movsl" : "+S"(address), "+D"(to), "+c"(left) :: "memory");
	for (u32 index = 0; index < count; index++) {
		sum += copy[index];
	}
	return sum;
}

/* The first serial port: an event in the line status register is awaited, none is lost. */
enum { SERIAL = 0x3f8, LINE_STATUS = SERIAL + 5, RECEIVED = 1, EMPTY = 0x20 };

static int to_log;

static void put(char c)
{
	if (to_log) {
		out(0xe9, 1, c);
		return;
	}
	while (!(in(LINE_STATUS, 1) & EMPTY)) {
	}
	out(SERIAL, 1, c);
}

/* Time that costs neither Xen nor dom0 anything: each look at the serial port is work for the device model, and another of the many
 * exits of which QEMU's emulation of SVM loses one now and then. */
static void rest(void)
{
	for (volatile u32 round = 0; round < 20000; round++) {
	}
}

static char get(void)
{
	while (!(in(LINE_STATUS, 1) & RECEIVED)) {
		rest();
	}
	return in(SERIAL, 1);
}

static void say(const char *text)
{
	while (*text) {
		put(*text++);
	}
}

static void digits(u32 value, int count)
{
	while (count--) {
		put("0123456789abcdef"[value >> (4 * count) & 15]);
	}
}

static void number(u32 value)
{
	int count = 1;
	while (count < 8 && value >> (4 * count)) {
		count++;
	}
	digits(value, count);
}

static u32 slot, ecam;

static u32 select(u32 at)
{
	out(0xcf8, 4, 0x80000000 | slot << 11 | (at & 0xfc));
	return 0xcfc + (at & 3);
}

static u32 config(u32 at, u32 size)
{
	return in(select(at), size);
}

static u32 extended(u32 at, u32 size)
{
	return load(ecam + (slot << 15) + at, size);
}

static void dump(u32 size)
{
	to_log = 1;
	for (u32 at = 0; at < 4096; at += size) {
		u32 value = extended(at, size);
		for (u32 byte = 0; byte < size; byte++) {
			digits(value >> (8 * byte) & 0xff, 2);
		}
		if ((at + size) % 32 == 0) {
			put('\n');
		}
	}
	to_log = 0;
}

static u32 differences(void)
{
	u32 count = 0;
	for (u32 size = 1; size <= 4; size *= 2) {
		for (u32 at = 0; at < 256; at += size) {
			count += config(at, size) != extended(at, size);
		}
	}
	return count;
}

static u32 spared_at, spared_bits;

enum { NOTHING = 5 };

/* FNV-1a over the bytes of all values. */
static u32 sweep(u32 class, u32 size, int through_ecam)
{
	u32 hash = 0x811c9dc5, mask = size == 4 ? ~0u : (1u << (8 * size)) - 1;
	u32 end = !through_ecam ? 256 : size == 4 ? 4096 : 512, step = through_ecam ? size : 1;
	for (u32 at = 0; at < end; at += step) {
		u32 value = through_ecam ? extended(at, size) : config(at, size);
		if (class != NOTHING) {
			switch (class) {
			case 0: value = 0; break;
			case 1: value = ~0u; break;
			case 2: value = ~value; break;
			case 3: value = 0xa5a5a5a5; break;
			}
			if (at <= spared_at && spared_at < at + size) {
				value &= ~(spared_bits << (8 * (spared_at - at)));
			}
			value &= mask;
			if (through_ecam) {
				store(ecam + (slot << 15) + at, size, value);
				value = extended(at, size);
			} else {
				out(select(at), size, value);
				value = config(at, size);
			}
		}
		for (u32 byte = 0; byte < size; byte++) {
			hash = (hash ^ (value >> (8 * byte) & 0xff)) * 0x01000193;
		}
	}
	return hash;
}

static u32 loop(u32 rounds)
{
	u32 count = 0;
	u32 first[4];
	for (u32 at = 0; at < 4; at++) {
		first[at] = config(4 * at, 4);
	}
	while (rounds--) {
		for (u32 at = 0; at < 4; at++) {
			count += config(4 * at, 4) != first[at];
		}
	}
	return count;
}

static u32 repeat(u32 at, u32 rounds, int select_again)
{
	u32 count = 0, first = config(at, 4);
	while (rounds--) {
		count += (select_again ? config(at, 4) : in(0xcfc, 4)) != first;
	}
	return count;
}

/* Interrupts: 16 vectors, each counted; the local APIC and both 8259 get the end of each. */
enum { FIRST = 0x40, VECTORS = 16, SPURIOUS_VECTOR = 0xff, APIC = 0xfee00000, SPURIOUS = APIC + 0xf0, END = APIC + 0xb0,
       COMMAND = APIC + 0x300, TO_ITSELF = 1 << 18 };

static volatile u32 counts[VECTORS];
static struct { u32 address, size, value; } ends[VECTORS];
static int uses_pic;

static struct __attribute__((packed)) { u16 low, selector, kind, high; } idt[256];
static struct __attribute__((packed)) { u16 limit; u32 base; } idt_place;

/* Where boot.S lets the stack begin. */
enum { STACK = 0x7c00 };

/* The unexpected is reported on port E9 and ends the guest: an exception, or an interrupt by a vector that was not set up. */
static void unexpected(const u32 *stack)
{
	/* Where Xen's log has it, whatever became of the serial port. */
	to_log = 1;
	say("stopped by vector and stack");
	for (int word = 0; word < 5; word++) {
		put(' ');
		number(stack[word]);
	}
	/* What was called before, as far as it has not been overwritten, and what calls are still open. */
	say("\nregisters and stack below");
	for (const u32 *word = stack - 40; word < stack; word++) {
		put(' ');
		number(*word);
	}
	say("\nstack above");
	for (const u32 *word = stack; word < (const u32 *)STACK; word++) {
		put(' ');
		number(*word);
	}
	put('\n');
	/* Halted without interrupts, the domain would be powered off. */
	for (;;) {
		__asm__ volatile("pause");
	}
}

/* An interrupt gate clears the interrupt flag, so none can come while it is clear. QEMU's emulation of SVM sometimes delivers one that
 * Xen has injected a second time, before the first instruction of its handler or within it: QEMU's vCPU is asked to leave its loop
 * while the number of the injected vector is still noted as an exception to be delivered. Only that is left out here. */
enum { INTERRUPT_FLAG = 0x200 };

static u32 delivered_twice;

#include "events.h"
#include "acpi.h"

void interrupted(const u32 *stack)
{
	u32 vector = *stack, index = vector & (VECTORS - 1);
	if (vector == SPURIOUS_VECTOR) {
		return;
	}
	if (vector >= 32 && !(stack[3] & INTERRUPT_FLAG)) {
		delivered_twice++;
		return;
	}
	if (vector == EVENT_VECTOR && uses_xen) {
		take_events();
		return;
	}
	if (vector - FIRST >= VECTORS) {
		unexpected(stack);
	}
	if (vector == FIRST + SCI && uses_acpi) {
		take_acpi_event();
	}
	counts[index]++;
	if (ends[index].size) {
		store(ends[index].address, ends[index].size, ends[index].value);
	}
	store(END, 4, 0);
	if (uses_pic) {
		out(0xa0, 1, 0x20);
		out(0x20, 1, 0x20);
	}
}

extern const u8 entries[];
__asm__(".globl entries\n"
	"entries:\n"
	".set vector, 0\n"
	".rept 256\n"
	".align 16\n"
	"pushl $vector\n"
	"jmp common\n"
	".set vector, vector + 1\n"
	".endr\n"
	"common:\n"
	"pushal\n"
	"leal 32(%esp), %eax\n"
	"pushl %eax\n"
	"call interrupted\n"
	"addl $4, %esp\n"
	"popal\n"
	"addl $4, %esp\n"
	"iretl\n");

static void set_up_interrupts(void)
{
	for (u32 vector = 0; vector < 256; vector++) {
		u32 entry = (u32)entries + 16 * vector;
		idt[vector].low = entry;
		idt[vector].selector = 8;
		idt[vector].kind = 0x8e00;
		idt[vector].high = entry >> 16;
	}
	idt_place.limit = sizeof idt - 1;
	idt_place.base = (u32)idt;
	__asm__ volatile("lidt %0" :: "m"(idt_place));
	/* Nothing of the BIOS's comes: both 8259 are masked. */
	out(0x21, 1, 0xff);
	out(0xa1, 1, 0xff);
	store(SPURIOUS, 4, 0x100 | SPURIOUS_VECTOR);
	__asm__ volatile("sti");
}

static void use_pic(void)
{
	static const u8 first[] = { 0x11, FIRST, 4, 1 }, second[] = { 0x11, FIRST + 8, 2, 1 };
	uses_pic = 1;
	for (int word = 0; word < 4; word++) {
		out(word ? 0x21 : 0x20, 1, first[word]);
		out(word ? 0xa1 : 0xa0, 1, second[word]);
	}
	/* All lines but the timer's, the keyboard's and the serial ports'. */
	out(0x21, 1, 0x1b);
	out(0xa1, 1, 0x00);
}

/* Through its own interrupt controller alone: no device and no program of dom0 takes part. */
static u32 interrupt_itself(u32 vector, u32 rounds)
{
	volatile u32 *count = &counts[vector & (VECTORS - 1)];
	u32 before = *count;
	while (rounds--) {
		u32 now = *count;
		store(COMMAND, 4, TO_ITSELF | vector);
		while (*count == now) {
		}
	}
	return *count - before;
}

static u32 kept_by_cr2(u32 value)
{
	__asm__ volatile("movl %0, %%cr2; movl %%cr2, %0" : "+r"(value));
	return value;
}

static char line[256];

static void read_line(void)
{
	u32 length = 0;
	for (;;) {
		char c = get();
		if (c == '\n') {
			break;
		}
		if (length < sizeof line - 1) {
			line[length++] = c;
		}
	}
	line[length] = 0;
}

static int is(const char *word)
{
	const char *at = line;
	while (*word && *at == *word) {
		at++;
		word++;
	}
	return !*word && (!*at || *at == ' ');
}

/* The Nth word of the line as a number. */
static u32 argument(u32 index)
{
	const char *at = line;
	u32 value = 0;
	while (index && *at) {
		index -= *at++ == ' ';
	}
	for (; *at && *at != ' '; at++) {
		value = value << 4 | (*at <= '9' ? *at - '0' : (*at | 0x20) - 'a' + 10);
	}
	return value;
}

static void obey(void)
{
	u32 a = argument(1), b = argument(2), c = argument(3);
	if (is("slot")) {
		slot = a;
	} else if (is("ecam")) {
		ecam = a;
	} else if (is("r")) {
		number(config(a, b));
	} else if (is("w")) {
		out(select(a), b, c);
	} else if (is("e")) {
		number(extended(a, b));
	} else if (is("f")) {
		store(ecam + (slot << 15) + a, b, c);
	} else if (is("edump")) {
		dump(a);
	} else if (is("same")) {
		number(differences());
	} else if (is("spare")) {
		spared_at = a;
		spared_bits = b;
	} else if (is("sum")) {
		number(sweep(NOTHING, a, 0));
	} else if (is("sweep")) {
		number(sweep(a, b, 0));
	} else if (is("esum")) {
		number(sweep(NOTHING, a, 1));
	} else if (is("esweep")) {
		number(sweep(a, b, 1));
	} else if (is("loop")) {
		number(loop(a));
	} else if (is("repeat")) {
		number(repeat(a, b, 1));
	} else if (is("reread")) {
		number(repeat(a, b, 0));
	} else if (is("m")) {
		number(load(a, b));
	} else if (is("n")) {
		store(a, b, c);
	} else if (is("m8")) {
		u64 value = load_long(a);
		digits(value >> 32, 8);
		digits(value, 8);
	} else if (is("n8")) {
		store_long(a, (u64)b << 32 | c);
	} else if (is("copy")) {
		number(copied(a, b));
	} else if (is("i")) {
		number(in(a, b));
	} else if (is("o")) {
		out(a, b, c);
	} else if (is("count")) {
		number(counts[a & (VECTORS - 1)]);
	} else if (is("twice")) {
		number(delivered_twice);
	} else if (is("end")) {
		ends[a & (VECTORS - 1)].address = b;
		ends[a & (VECTORS - 1)].size = c;
		ends[a & (VECTORS - 1)].value = argument(4);
	} else if (is("ipi")) {
		number(interrupt_itself(a, b));
	} else if (is("xen")) {
		number(set_up_xen());
	} else if (is("pirq")) {
		number(free_pirq());
	} else if (is("bind")) {
		number(bind_pirq(a));
	} else if (is("close")) {
		number(close_port(a));
	} else if (is("events")) {
		number(events[a % PORTS]);
	} else if (is("emask")) {
		change_bit(masked, a % PORTS, 1);
	} else if (is("eunmask")) {
		number(unmask_port(a));
	} else if (is("cr2")) {
		number(kept_by_cr2(a));
	} else if (is("pic")) {
		use_pic();
	} else if (is("acpi")) {
		use_acpi();
		use_pic();
	} else if (is("hotplugs")) {
		number(hotplugs);
	} else {
		say("what?");
	}
	put('\n');
}

/* Whatever goes astray stops at its first step: zeros would be executed up to the BIOS's own data. */
static void fill_with_breakpoints(u8 *from, u8 *end)
{
	while (from < end) {
		*from++ = 0xcc;
	}
}

__attribute__((section(".text.start"))) void _start(void)
{
	fill_with_breakpoints((u8 *)0x8000, (u8 *)0x10000);
	fill_with_breakpoints((u8 *)0x18000, (u8 *)0x9f000);
	set_up_interrupts();
	/* Until somebody listens and speaks: what is said before is lost. */
	while (!(in(LINE_STATUS, 1) & RECEIVED)) {
		say("ready\n");
		for (u32 pause = 0; pause < 100 && !(in(LINE_STATUS, 1) & RECEIVED); pause++) {
			rest();
		}
	}
	for (;;) {
		read_line();
		obey();
	}
}
