//! The checks, one function each.

use std::collections::BTreeSet;

use pciback::Sbdf;
use pciback::platform::HostFunction;
use pciback::serve::pv::nodes;

use super::Examined;
use crate::outcome;
use crate::protocol::{Finding, Verdict};
use crate::spec::vf_routing;
use crate::transaction::holder_of;

/// All checks, in the order of display: those on which others depend come first.
pub(super) const CHECKS: [fn(&Examined<'_>) -> Finding; 13] = [
    xen,
    dom0,
    xenstored,
    iommu,
    interrupt_remapping,
    quarantine,
    kernel,
    holder,
    aer,
    tracing,
    udev_rules,
    vf_buses,
    other_toolstack,
];

/// The versions of Xen that xpci is tested with.
const XEN: std::ops::RangeInclusive<(u32, u32)> = (4, 17)..=(4, 20);
/// The oldest kernel that lists reset methods (`reset_method`), and the oldest that xpci is tested with.
const KERNEL: [(u32, u32); 2] = [(5, 15), (6, 1)];
/// How to change Xen's command line.
const COMMAND_LINE: &str = "change GRUB_CMDLINE_XEN in /etc/default/grub, run 'update-grub', and reboot";

fn good(check: &str, found: impl Into<String>) -> Finding {
    Finding::new(check, Verdict::Good, found)
}

fn warning(check: &str, found: impl Into<String>, mend: impl Into<String>) -> Finding {
    Finding::new(check, Verdict::Warning, found).mend(mend)
}

fn fault(check: &str, found: impl Into<String>, mend: impl Into<String>) -> Finding {
    Finding::new(check, Verdict::Fault, found).mend(mend)
}

fn not_checked(check: &str, why: impl Into<String>) -> Finding {
    Finding::new(check, Verdict::NotChecked, why)
}

/// The text of a file in dom0; an unreadable file counts as missing.
fn text(examined: &Examined<'_>, path: &str) -> Option<String> {
    examined.machine.text(path).ok().flatten()
}

/// The value of a key of `xl info`.
fn value<'a>(info: &'a str, key: &str) -> Option<&'a str> {
    let line = info.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix(':'));
    line.map(str::trim)
}

/// The first two numbers of a version.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|char: char| !char.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn xen(examined: &Examined<'_>) -> Finding {
    if text(examined, "/sys/hypervisor/type").as_deref() != Some("xen") {
        return fault(
            "xen",
            "this machine does not run under Xen",
            "install it (Debian: the package xen-system-amd64) and boot its entry",
        );
    }
    let part = |name: &str| text(examined, &format!("/sys/hypervisor/version/{name}"))?.parse().ok();
    let found = part("major").zip(part("minor"));
    let Some((major, minor)) = found else {
        return not_checked("xen", "the kernel does not say which version of Xen this is");
    };
    let shown = format!("Xen {major}.{minor}");
    let ((first, oldest), (last, newest)) = (*XEN.start(), *XEN.end());
    match (major, minor) {
        version if XEN.contains(&version) => good("xen", shown),
        version if version < *XEN.start() => {
            fault("xen", shown, format!("upgrade to Xen {first}.{oldest} or newer"))
        }
        _ => warning(
            "xen",
            shown,
            format!("xpci is tested with Xen {first}.{oldest} to {last}.{newest}: look for a newer xpci"),
        ),
    }
}

fn dom0(examined: &Examined<'_>) -> Finding {
    match text(examined, "/proc/xen/capabilities") {
        Some(words) if words.contains("control_d") => {
            match text(examined, "/sys/hypervisor/guest_type").as_deref() {
                Some("PVH") => fault(
                    "dom0",
                    "dom0 is a PVH domain: Xen refuses it hypercalls that are needed to attach functions",
                    "remove dom0=pvh from Xen's command line and boot again",
                ),
                _ => good("dom0", "this is the control domain"),
            }
        }
        Some(_) => fault("dom0", "this is a guest of Xen", "run xpci in dom0"),
        None => fault(
            "dom0",
            "/proc/xen is not mounted",
            "run 'modprobe xenfs' and 'mount -t xenfs xenfs /proc/xen', as root; Xen's init script does both",
        ),
    }
}

fn xenstored(examined: &Examined<'_>) -> Finding {
    let start = "start it ('systemctl start xenstored', in Debian '/etc/init.d/xen start')";
    match examined.store.map(|store| store.list("/local/domain")) {
        Some(Ok(domains)) => good("xenstored", format!("it answers; there are {} domains", domains.len())),
        Some(Err(error)) => fault("xenstored", error.to_string(), start),
        None if ["/run/xenstored/socket", "/var/run/xenstored/socket"]
            .iter()
            .any(|path| examined.machine.exists(path)) =>
        {
            good("xenstored", "it has its socket")
        }
        None => not_checked(
            "xenstored",
            "without xpcid only its socket can be checked, which does not exist; xenstored may run in a domain of its own",
        ),
    }
}

/// The words of Xen's option `iommu`, which may be given several times.
fn iommu_options(info: &str) -> Vec<&str> {
    let options = value(info, "xen_commandline").unwrap_or_default().split_whitespace();
    options.filter_map(|option| option.strip_prefix("iommu=")).flat_map(|words| words.split(',')).collect()
}

/// Whether the words switch this part of the IOMMU off; the last one wins.
fn switched_off(words: &[&str], part: &str) -> bool {
    let off = |word: &&str| match word.split_once('=') {
        Some((name, value)) if name == part => Some(["no", "off", "0", "false", "disable"].contains(&value)),
        Some(_) => None,
        None if *word == part => Some(false),
        None => (word.strip_prefix("no-") == Some(part)).then_some(true),
    };
    words.iter().rev().find_map(off).unwrap_or(false)
}

fn iommu(examined: &Examined<'_>) -> Finding {
    let info = match &examined.info {
        Ok(info) => info,
        Err(why) => return not_checked("iommu", why),
    };
    let capabilities = value(info, "virt_caps").unwrap_or_default();
    let given = |guest: &str| capabilities.split_whitespace().any(|word| word == format!("{guest}_directio"));
    if given("hvm") || given("pv") {
        return good("iommu", "Xen uses the IOMMU");
    }
    let words = iommu_options(info);
    if words.iter().any(|word| ["no", "off", "0", "false", "disable"].contains(word)) {
        let mend = format!("leave the option out: {COMMAND_LINE}");
        return fault("iommu", "Xen's command line switches the IOMMU off with 'iommu='", mend);
    }
    fault(
        "iommu",
        "Xen uses no IOMMU: no function can be given to a guest",
        "enable VT-d (Intel) or AMD-Vi (AMD) in the firmware's settings; 'xl dmesg' says why Xen does not use it",
    )
}

fn interrupt_remapping(examined: &Examined<'_>) -> Finding {
    let check = "interrupt-remapping";
    let log = match &examined.log {
        Ok(log) => log,
        Err(why) => return not_checked(check, why),
    };
    // Other lines mention the remapping tables.
    let state = |line: &str| {
        let rest = line.split_once("Interrupt remapping ")?.1.trim_end();
        [("enabled", true), ("disabled", false)].into_iter().find(|(word, _)| *word == rest).map(|(_, on)| on)
    };
    let found = log.lines().rev().find_map(state);
    let mend = match examined.info.as_deref().is_ok_and(|info| switched_off(&iommu_options(info), "intremap"))
    {
        true => format!("Xen's command line switches it off with 'iommu=no-intremap': {COMMAND_LINE}"),
        false => "enable it in the firmware's settings (x2APIC and VT-d, or AMD-Vi)".to_owned(),
    };
    match found {
        Some(true) => good(check, "guests' functions send their own interrupts only"),
        Some(false) => warning(
            check,
            "it is off: a guest's function can send any interrupt to the host, by writing to memory",
            mend,
        ),
        None => not_checked(check, "Xen's log ('xl dmesg') no longer has the line that says it"),
    }
}

fn quarantine(examined: &Examined<'_>) -> Finding {
    let info = match &examined.info {
        Ok(info) => info,
        Err(why) => return not_checked("quarantine", why),
    };
    if switched_off(&iommu_options(info), "quarantine") {
        return warning(
            "quarantine",
            "Xen's command line switches the quarantine off: a function that a guest has lost can still reach dom0's memory",
            format!("leave 'no-quarantine' out: {COMMAND_LINE}"),
        );
    }
    good("quarantine", "Xen keeps functions that no guest has from all memory")
}

fn kernel(examined: &Examined<'_>) -> Finding {
    let Some(release) = text(examined, "/proc/sys/kernel/osrelease") else {
        return not_checked("kernel", "/proc/sys/kernel/osrelease cannot be read");
    };
    let shown = format!("Linux {release}");
    let [oldest, tried] = KERNEL;
    match version(&release) {
        None => not_checked("kernel", format!("'{release}' is not a version")),
        Some(found) if found < oldest => fault(
            "kernel",
            format!("{shown} does not list reset methods"),
            format!("use Linux {}.{} or newer", tried.0, tried.1),
        ),
        Some(found) if found < tried => {
            let mend = format!("xpci is tested with Linux {}.{} and newer", tried.0, tried.1);
            warning("kernel", shown, mend)
        }
        Some(_) => good("kernel", shown),
    }
}

fn holder(examined: &Examined<'_>) -> Finding {
    let loaded = match examined.host.drivers() {
        Ok(loaded) => loaded,
        Err(error) => return not_checked("holder", error.to_string()),
    };
    let has = |name: &str| loaded.iter().any(|driver| driver == name);
    let load = "run 'modprobe xen-pciback', and write xen-pciback to /etc/modules-load.d/xpci.conf";
    match (has("pciback"), has("pci-stub")) {
        (true, _) => good("holder", "xen-pciback is loaded"),
        (false, true) => warning(
            "holder",
            "only pci-stub is loaded to hold functions: it prevents recovery from errors below the same port",
            load,
        ),
        (false, false) => fault("holder", "no driver is loaded that could hold functions", load),
    }
}

fn functions(examined: &Examined<'_>) -> Result<Vec<HostFunction>, String> {
    let addresses = examined.host.functions().map_err(|error| error.to_string())?;
    Ok(addresses.into_iter().filter_map(|address| examined.host.function(address).ok()).collect())
}

/// The first few functions of a list.
fn few(list: &[Sbdf]) -> String {
    outcome::few(&list.iter().map(ToString::to_string).collect::<Vec<_>>(), 4)
}

fn aer(examined: &Examined<'_>) -> Finding {
    let functions = match functions(examined) {
        Ok(functions) => functions,
        Err(why) => return not_checked("aer", why),
    };
    let above = |function: &HostFunction| examined.host.ports_above(function.address).ok()?.last().copied();
    let roots: BTreeSet<Sbdf> = functions.iter().filter_map(above).collect();
    if roots.is_empty() {
        return not_checked("aer", "there is no root port with a function below it");
    }
    let mut without = Vec::new();
    for root in &roots {
        match examined.errors.handled(*root) {
            Ok(true) => {}
            Ok(false) => without.push(*root),
            Err(error) => return not_checked("aer", error.to_string()),
        }
    }
    if without.is_empty() {
        return good("aer", format!("Linux handles errors at all {} root ports with functions", roots.len()));
    }
    let found = format!(
        "Linux does not handle errors at {} of {} root ports: {}; xpci does not notice errors below",
        without.len(),
        roots.len(),
        few(&without)
    );
    let disabled = text(examined, "/proc/cmdline").is_some_and(|line| line.contains("noaer"));
    let mend = match disabled {
        true => "dom0's command line has 'pci=noaer': leave it out, and reboot",
        false => {
            "let the operating system handle AER in the firmware's settings; or, where the firmware does not use it itself, add \
             'pcie_ports=native' to dom0's command line"
        }
    };
    warning("aer", found, mend)
}

fn tracing(examined: &Examined<'_>) -> Finding {
    if examined.machine.exists("/sys/kernel/tracing/events/ras/aer_event") {
        return good("tracing", "the kernel traces errors (ras:aer_event)");
    }
    // The directory is readable for root only.
    let known = examined.machine.exists("/sys/kernel/tracing/events");
    match known {
        true => warning(
            "tracing",
            "the kernel has no trace event ras:aer_event: xpcid notices errors by their counters only",
            "use a kernel with CONFIG_RAS, as Debian's has",
        ),
        false => warning(
            "tracing",
            "tracefs is not mounted at /sys/kernel/tracing, or cannot be read: xpcid notices errors by their counters only",
            "run 'mount -t tracefs tracefs /sys/kernel/tracing', as root; systemd does it by itself",
        ),
    }
}

fn udev_rules(examined: &Examined<'_>) -> Finding {
    let folders = ["/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib"];
    let file = |folder: &&str| format!("{folder}/udev/rules.d/90-xpci.rules");
    match folders.iter().map(file).find(|path| examined.machine.exists(path)) {
        Some(path) => good("udev-rules", path),
        None => warning(
            "udev-rules",
            "90-xpci.rules is not installed: systemd does not start xpcid for functions that appear",
            "install the package xpci, or run 'make install'",
        ),
    }
}

fn vf_buses(examined: &Examined<'_>) -> Finding {
    let functions = match functions(examined) {
        Ok(functions) => functions,
        Err(why) => return not_checked("vf-buses", why),
    };
    let pfs: Vec<&HostFunction> = functions.iter().filter(|function| function.total_vfs > 0).collect();
    if pfs.is_empty() {
        return good("vf-buses", "the host has no function with SR-IOV");
    }
    let mut problems = Vec::new();
    for pf in &pfs {
        match vf_routing(examined.host, pf.address, pf.total_vfs) {
            Ok(Ok(())) => {}
            Ok(Err(why)) => problems.push(why.to_string()),
            Err(failure) => return not_checked("vf-buses", failure.message),
        }
    }
    match problems.is_empty() {
        true => good("vf-buses", format!("all VFs of {} PFs have bus numbers", pfs.len())),
        false => warning(
            "vf-buses",
            problems.join("; "),
            "enable fewer VFs; or reserve more buses below that bridge, by the firmware's settings or 'pci=assign-busses' on dom0's \
             command line",
        ),
    }
}

fn other_toolstack(examined: &Examined<'_>) -> Finding {
    let check = "xl-functions";
    let Some(store) = examined.store else {
        return not_checked(check, "without xpcid there is no connection to xenstore");
    };
    let functions = match functions(examined) {
        Ok(functions) => functions,
        Err(why) => return not_checked(check, why),
    };
    let mut given = Vec::new();
    for function in functions.iter().filter(|function| holder_of(function).is_some()) {
        match nodes::pciback_guest(store, function.address) {
            Ok(Some(domain)) => given.push(format!("{} (domain {domain})", function.address)),
            Ok(None) => {}
            Err(error) => return not_checked(check, error.to_string()),
        }
    }
    match given.is_empty() {
        true => good(check, "no guest has functions through xl"),
        false => good(
            check,
            format!("guests have these through xl; xpci does not touch them: {}", given.join(", ")),
        ),
    }
}
