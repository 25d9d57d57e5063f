/* Hotplug of PCI devices over ACPI, as Xen's firmware describes it to systems (tools/firmware/hvmloader, tools/libacpi/mk_dsdt.c): general-purpose
 * event 1 of the block at ports AFE0 to AFE3, status before enable; it interrupts by line 9. */

enum { GPE_STATUS = 0xafe0, GPE_ENABLE = 0xafe2, PCI_HOTPLUG = 1 << 1, SCI = 9 };

static volatile u32 hotplugs;
static int uses_acpi;

static void use_acpi(void)
{
	uses_acpi = 1;
	hotplugs = 0;
	out(GPE_STATUS, 1, 0xff);
	out(GPE_ENABLE, 1, PCI_HOTPLUG);
}

/* The status is cleared before the reason is looked for, so that nothing that comes then is missed. */
static void take_acpi_event(void)
{
	if (in(GPE_STATUS, 1) & PCI_HOTPLUG) {
		out(GPE_STATUS, 1, PCI_HOTPLUG);
		hotplugs++;
	}
}
