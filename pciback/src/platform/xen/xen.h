/* What build.rs reads: every header whose functions, types or constants xpci uses. */
#include <xenctrl.h>
#include <xencall.h>
#include <xengnttab.h>
#include <xenevtchn.h>
#include <xendevicemodel.h>
#include <xenforeignmemory.h>
#include <xentoollog.h>
#include <xenstore.h>
#include <xen/memory.h>
#include <xen/physdev.h>
#include <xen/hvm/hvm_op.h>
#include <xen/sysctl.h>
