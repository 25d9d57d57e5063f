/* What build.rs reads: every header whose functions, types or constants xpci uses. */
#include <xenctrl.h>
#include <xencall.h>
#include <xengnttab.h>
#include <xenevtchn.h>
#include <xentoollog.h>
#include <xenstore.h>
#include <xen/physdev.h>
#include <xen/sysctl.h>
