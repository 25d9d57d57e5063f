//! Tests of the checks on simulated hosts: a correct one, and one for each possible fault.

use pciback::platform::Platform;
use pciback::platform::sim::Simulation;

use super::*;
use crate::protocol::all_good;

const HOST: &str = "\
drivers: [igb, pciback]
functions:
  - {address: 00:01.0, model: root-port, buses: [1, 1]}
  - {address: 01:00.0, model: '82576'}
domains:
  - {id: 1, name: web, passthrough: true}
";

fn platform(yaml: &str) -> Platform {
    Simulation::from_yaml(yaml).unwrap().platform("test").unwrap()
}

fn finding(yaml: &str, check: &str) -> Finding {
    let findings = examine(&platform(yaml));
    findings.into_iter().find(|finding| finding.check == check).unwrap()
}

/// The host with other texts.
fn with(texts: &str) -> String {
    format!("{HOST}machine:\n  {texts}\n")
}

#[test]
fn a_correct_host_passes_every_check() {
    for finding in examine(&platform(HOST)) {
        assert_eq!(finding.verdict, Verdict::Good, "{finding:?}");
        assert_eq!(finding.mend, None, "{finding:?}");
    }
}

#[test]
fn each_fault_is_found_by_its_check_with_a_correction() {
    use Verdict::{Fault, NotChecked, Warning};
    let info = |virt: &str, line: &str| {
        with(&format!("xl info: \"virt_caps : {virt}\\nxen_commandline : {line}\\n\""))
    };
    for (host, check, verdict, named) in [
        (with("/sys/hypervisor/type: null"), "xen", Fault, "does not run under Xen"),
        (format!("xen: 4.16\n{HOST}"), "xen", Fault, "Xen 4.16"),
        (format!("xen: 4.21\n{HOST}"), "xen", Warning, "Xen 4.21"),
        (with("/proc/xen/capabilities: ''"), "dom0", Fault, "a guest of Xen"),
        (with("/proc/xen/capabilities: null"), "dom0", Fault, "not mounted"),
        (with("/sys/hypervisor/guest_type: PVH"), "dom0", Fault, "PVH"),
        (info("pv hvm", "iommu=off"), "iommu", Fault, "switches the IOMMU off"),
        (info("pv hvm", ""), "iommu", Fault, "uses no IOMMU"),
        (with("xl info: null"), "iommu", NotChecked, "run 'xl info'"),
        (
            info("hvm_directio", "iommu=force,no-quarantine"),
            "quarantine",
            Warning,
            "switches the quarantine off",
        ),
        (info("hvm_directio", "iommu=quarantine=off"), "quarantine", Warning, "switches the quarantine off"),
        (
            with("xl dmesg: '(XEN) Interrupt remapping disabled'"),
            "interrupt-remapping",
            Warning,
            "any interrupt",
        ),
        (
            with(
                "xl dmesg: \"(XEN) Interrupt remapping disabled\\n(XEN) Interrupt remapping table at 1\\n\"",
            ),
            "interrupt-remapping",
            Warning,
            "any interrupt",
        ),
        (with("xl dmesg: '(XEN) traps.c'"), "interrupt-remapping", NotChecked, "no longer has the line"),
        (with("/proc/sys/kernel/osrelease: 5.10.0-1-amd64"), "kernel", Fault, "Linux 5.10.0"),
        (with("/proc/sys/kernel/osrelease: 5.15.3"), "kernel", Warning, "Linux 5.15.3"),
        (with("/proc/sys/kernel/osrelease: next"), "kernel", NotChecked, "not a version"),
        (HOST.replace("pciback", "pci-stub"), "holder", Warning, "only pci-stub"),
        (HOST.replace(", pciback", ""), "holder", Fault, "no driver is loaded"),
        (
            with("/sys/kernel/tracing/events/ras/aer_event/enable: null"),
            "tracing",
            Warning,
            "tracefs is not mounted",
        ),
        (with("/usr/lib/udev/rules.d/90-xpci.rules: null"), "udev-rules", Warning, "not installed"),
        (
            format!("{HOST}failures: [{{operation: list, path: /local/domain, errno: EIO}}]\n"),
            "xenstored",
            Fault,
            "EIO",
        ),
    ] {
        let found = finding(&host, check);
        assert_eq!(found.verdict, verdict, "{host}: {found:?}");
        assert!(found.found.contains(named), "{found:?}");
        assert_eq!(found.mend.is_some(), verdict != NotChecked, "{found:?}");
    }
}

#[test]
fn an_option_given_twice_counts_as_xen_counts_it() {
    let info =
        |line: &str| with(&format!("xl info: \"virt_caps : hvm_directio\\nxen_commandline : {line}\\n\""));
    let quarantine = |line: &str| finding(&info(line), "quarantine").verdict;
    assert_eq!(quarantine("iommu=no-quarantine iommu=quarantine"), Verdict::Good);
    assert_eq!(quarantine("iommu=quarantine iommu=no-quarantine"), Verdict::Warning);
}

#[test]
fn root_ports_whose_errors_linux_does_not_handle_are_counted() {
    let simulation = Simulation::from_yaml(HOST).unwrap();
    simulation.withhold_aer(true);
    let found = examine(&simulation.platform("test").unwrap());
    let aer = found.iter().find(|finding| finding.check == "aer").unwrap();
    assert_eq!(aer.verdict, Verdict::Warning);
    assert!(aer.found.contains("1 of 1 root ports: 0000:00:01.0"), "{aer:?}");
}

#[test]
fn vfs_without_bus_numbers_are_found_before_they_are_enabled() {
    // VFs of this PF have an offset of 128, so that from device 10 on they are on the next bus.
    let host = HOST.replace("01:00.0", "01:1f.0");
    let found = finding(&host, "vf-buses");
    assert_eq!(found.verdict, Verdict::Warning, "{found:?}");
    assert!(found.found.contains("need the buses 01 to 02"), "{found:?}");
}

#[test]
fn only_a_warning_or_a_fault_stops_a_script() {
    let of = |verdict| vec![Finding::new("xen", Verdict::Good, ""), Finding::new("aer", verdict, "")];
    assert!(all_good(&of(Verdict::Good)) && all_good(&of(Verdict::NotChecked)));
    assert!(!all_good(&of(Verdict::Warning)) && !all_good(&of(Verdict::Fault)));
}
