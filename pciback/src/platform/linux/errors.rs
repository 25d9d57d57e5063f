//! Errors through Linux's tracing: the event `ras:aer_event` in an instance of our own, and the counters in sysfs.
//!
//! The instance outlives a killed service and continues to collect, so that the next process finds what happened in between. The
//! text of an event is checked like untrusted input.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use log::{debug, warn};
use nix::libc::O_NONBLOCK;

use super::attributes::{link_name, parse_decimal, read_text};
use crate::Sbdf;
use crate::fault::{Detection, ErrorCounters, Fault, Severity};
use crate::platform::{Cause, ErrorEvent, ErrorEvents, ErrorSource, PlatformError, Result};
use crate::spec;

/// The name of our instance.
const INSTANCE: &str = "xpci";
/// Its buffer for each CPU, in KiB: some thousand events.
const BUFFER_KIB: &str = "256";
/// The longest line that an event can be.
const LINE_LIMIT: usize = 1024;
/// How much is read at once.
const CHUNK: usize = 16 * 1024;

/// Errors as Linux reports them.
pub struct LinuxErrors {
    sysfs: PathBuf,
}

impl LinuxErrors {
    /// Below this sysfs, usually `/sys`, with tracefs at `kernel/tracing`.
    pub fn new(sysfs: PathBuf) -> Self {
        Self { sysfs }
    }
}

impl ErrorSource for LinuxErrors {
    fn events(&self) -> Result<Box<dyn ErrorEvents>> {
        let tracing = self.sysfs.join("kernel/tracing");
        let instance = tracing.join("instances").join(INSTANCE);
        Instance::open(&instance).map(|instance| Box::new(instance) as Box<dyn ErrorEvents>).map_err(
            |error| {
                let cause = match error.kind() {
                    ErrorKind::NotFound => Cause::Unavailable(
                        "the kernel's tracing is not mounted, or has no aer_event: mount -t tracefs tracefs /sys/kernel/tracing"
                            .into(),
                    ),
                    _ => error.into(),
                };
                PlatformError::new("trace errors through", instance.display(), cause)
            },
        )
    }

    fn counters(&self, address: Sbdf) -> Result<Option<ErrorCounters>> {
        let directory = self.sysfs.join("bus/pci/devices").join(address.to_string());
        let total = |name: &str, word: &str| {
            let read = read_text(&directory.join(name))
                .and_then(|text| text.map(|text| parse_total(&text, word)).transpose());
            read.map_err(|cause| PlatformError::new("read the error counters of", address, cause))
        };
        let (Some(correctable), Some(non_fatal), Some(fatal)) = (
            total("aer_dev_correctable", "TOTAL_ERR_COR")?,
            total("aer_dev_nonfatal", "TOTAL_ERR_NONFATAL")?,
            total("aer_dev_fatal", "TOTAL_ERR_FATAL")?,
        ) else {
            return Ok(None);
        };
        Ok(Some(ErrorCounters { correctable, non_fatal, fatal }))
    }

    fn handled(&self, root_port: Sbdf) -> Result<bool> {
        // The kernel makes a device for each service of a port that the platform has granted it; AER's is number 2.
        let service = format!("bus/pci_express/devices/{root_port}:pcie002/driver");
        let driver = link_name(&self.sysfs.join(service))
            .map_err(|cause| PlatformError::new("ask who handles the errors of", root_port, cause))?;
        Ok(driver.as_deref() == Some("aer"))
    }
}

/// The last line of a file of counters: their sum.
fn parse_total(text: &str, word: &str) -> std::result::Result<u64, Cause> {
    let total = text.lines().find_map(|line| line.strip_prefix(word)?.strip_prefix(' '));
    parse_decimal(total.ok_or_else(|| Cause::Malformed(format!("no line '{word}'")))?.trim())
}

/// A private instance of the kernel's tracing with only our event in it; removed when it is dropped.
struct Instance {
    /// Closed before the instance is removed, as the first field: the kernel refuses while it is open.
    pipe: File,
    lines: RefCell<Lines>,
    place: InstanceDirectory,
}

/// The instance's directory, removed when it is dropped.
struct InstanceDirectory(PathBuf);

impl Drop for InstanceDirectory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            warn!("remove {}: {error}", self.0.display());
        }
    }
}

impl Instance {
    fn open(directory: &Path) -> io::Result<Self> {
        match fs::create_dir(directory) {
            // One that a previous process left.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            other => other?,
        }
        let set = |name: &str, value: &str| fs::write(directory.join(name), value);
        // Else the pipe is readable only when half of the buffer is full. Kernels before 5.0 have no such file, and no such wait.
        match set("buffer_percent", "0") {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        set("buffer_size_kb", BUFFER_KIB)?;
        set("events/ras/aer_event/enable", "1")?;
        let pipe =
            OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open(directory.join("trace_pipe"))?;
        Ok(Self { pipe, lines: RefCell::default(), place: InstanceDirectory(directory.to_owned()) })
    }
}

impl ErrorEvents for Instance {
    fn event_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    fn next_event(&self) -> Option<ErrorEvent> {
        let mut lines = self.lines.borrow_mut();
        loop {
            if let Some(event) = lines.ready.pop_front() {
                return Some(event);
            }
            let mut bytes = [0; CHUNK];
            match (&self.pipe).read(&mut bytes) {
                Ok(0) => return None,
                Ok(length) => lines.push(&bytes[..length]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != ErrorKind::WouldBlock {
                        warn!("read {}: {error}", self.place.0.display());
                    }
                    return None;
                }
            }
        }
    }
}

/// Bytes of the pipe, cut into lines.
#[derive(Default)]
struct Lines {
    line: Vec<u8>,
    /// The line is longer than any of an event: the rest of it is left out.
    too_long: bool,
    ready: VecDeque<ErrorEvent>,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\n' => {
                    let line = std::mem::take(&mut self.line);
                    if !std::mem::take(&mut self.too_long) {
                        self.ready.extend(parse(&String::from_utf8_lossy(&line)));
                    }
                }
                _ if self.line.len() < LINE_LIMIT => self.line.push(byte),
                _ => self.too_long = true,
            }
        }
    }
}

/// One line, for example
/// `irq/39-aerdrv-55 [001] ..... 34.160467: aer_event: 0000:02:00.0 PCIe Bus Error: severity=Uncorrected, non-fatal, Completion
/// Timeout, TLP Header=Not available`. `None` for what is none of ours.
fn parse(line: &str) -> Option<ErrorEvent> {
    if line.starts_with("CPU:") && line.contains("[LOST ") {
        return Some(ErrorEvent::Lost);
    }
    let (_, text) = line.split_once(": aer_event: ")?;
    let (address, rest) = text.split_once(" PCIe Bus Error: severity=")?;
    // A function of a segment above ffff cannot be assigned.
    let address: Sbdf = address.parse().ok()?;
    let kinds = [
        ("Corrected, ", Severity::Correctable),
        ("Uncorrected, non-fatal, ", Severity::NonFatal),
        ("Fatal, ", Severity::Fatal),
    ];
    let (severity, rest) =
        kinds.iter().find_map(|(word, severity)| Some((*severity, rest.strip_prefix(word)?)))?;
    let names = rest.split_once(", TLP Header=").map_or(rest, |(names, _)| names);
    let status = names.split('|').fold(0, |status, name| status | bit(severity, name.trim()));
    Some(ErrorEvent::Error(Fault { address, severity, status, detection: Detection::Event, count: 1 }))
}

/// The bit of an error that the kernel names. Its names are the specification's, shortened; bits without a name it prints as a
/// number.
fn bit(severity: Severity, name: &str) -> u32 {
    if let Some(digits) = name.strip_prefix("0x") {
        return u32::from_str_radix(digits, 16).unwrap_or(0);
    }
    if name.is_empty() {
        return 0;
    }
    let table: &[(u32, &str)] = match severity {
        Severity::Correctable => &spec::CORRECTABLE_ERRORS,
        Severity::NonFatal | Severity::Fatal => &spec::UNCORRECTABLE_ERRORS,
    };
    // So the kernel spells REPLAY_NUM.
    let name = if name == "RELAY_NUM Rollover" { "REPLAY_NUM Rollover" } else { name };
    let found = table.iter().find(|(_, known)| known.starts_with(name));
    if found.is_none() {
        debug!("the kernel names an error '{}', which is unknown", name.escape_debug());
    }
    found.map_or(0, |(bit, _)| *bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGIN: &str = "   irq/38-aerdrv-54      [000] .N...    26.657838: aer_event: ";

    fn fault(address: &str, severity: Severity, status: u32) -> Option<ErrorEvent> {
        let address = address.parse().unwrap();
        Some(ErrorEvent::Error(Fault { address, severity, status, detection: Detection::Event, count: 1 }))
    }

    #[test]
    fn lines_of_linux_6_1_are_understood() {
        // Seen in the lab.
        for (text, expected) in [
            (
                "0000:01:10.0 PCIe Bus Error: severity=Uncorrected, non-fatal, Completion Timeout, TLP Header=Not available",
                fault("01:10.0", Severity::NonFatal, 1 << 14),
            ),
            (
                "0000:01:10.0 PCIe Bus Error: severity=Corrected, Receiver Error, TLP Header=Not available",
                fault("01:10.0", Severity::Correctable, 1),
            ),
            (
                "0000:01:10.2 PCIe Bus Error: severity=Fatal, , TLP Header=Not available",
                fault("01:10.2", Severity::Fatal, 0),
            ),
            (
                "0001:01:10.0 PCIe Bus Error: severity=Fatal, Data Link Protocol|Malformed TLP|0x8, TLP Header={0x1,0x2,0x3,0x4}",
                fault("1:01:10.0", Severity::Fatal, 1 << 4 | 1 << 18 | 8),
            ),
            (
                "0000:01:10.0 PCIe Bus Error: severity=Corrected, RELAY_NUM Rollover|Sunshine, TLP Header=Not available",
                fault("01:10.0", Severity::Correctable, 1 << 8),
            ),
        ] {
            assert_eq!(parse(&format!("{BEGIN}{text}")), expected, "{text}");
        }
        assert_eq!(parse("CPU:0 [LOST 4711 EVENTS]"), Some(ErrorEvent::Lost));
    }

    #[test]
    fn what_is_no_event_of_ours_is_left_out() {
        for text in [
            "",
            "garbage",
            "0000:01:10.0 PCIe Bus Error: severity=Fatal, , TLP Header=Not available",
            &format!("{BEGIN}0000:01:10.9 PCIe Bus Error: severity=Fatal, , TLP Header="),
            &format!("{BEGIN}10000:01:10.0 PCIe Bus Error: severity=Fatal, , TLP Header="),
            &format!("{BEGIN}0000:01:10.0 PCIe Bus Error: severity=Terrible, , TLP Header="),
            &format!("{BEGIN}0000:01:10.0 PCIe Bus"),
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn lines_come_in_pieces_and_one_without_end_hides_only_itself() {
        let mut lines = Lines::default();
        let line =
            format!("{BEGIN}0000:01:10.2 PCIe Bus Error: severity=Fatal, , TLP Header=Not available\n");
        for byte in line.as_bytes() {
            assert!(lines.ready.is_empty());
            lines.push(&[*byte]);
        }
        assert_eq!(lines.ready.len(), 1);
        for _ in 0..100 {
            lines.push(&[b'x'; CHUNK]);
        }
        assert!(lines.line.len() <= LINE_LIMIT);
        lines.push(b"\n");
        lines.push(line.as_bytes());
        assert_eq!(lines.ready.len(), 2);
    }

    #[test]
    fn counters_are_their_sums_and_a_function_without_them_has_none() {
        let root = tempfile::tempdir().unwrap();
        let address: Sbdf = "01:10.0".parse().unwrap();
        let errors = LinuxErrors::new(root.path().to_owned());
        let directory = root.path().join("bus/pci/devices").join(address.to_string());
        fs::create_dir_all(&directory).unwrap();
        assert_eq!(errors.counters(address).unwrap(), None);
        for (name, text) in [
            ("aer_dev_correctable", "RxErr 2\nBadTLP 1\nTOTAL_ERR_COR 3\n"),
            ("aer_dev_nonfatal", "Undefined 0\nTOTAL_ERR_NONFATAL 18446744073709551615\n"),
            ("aer_dev_fatal", "TOTAL_ERR_FATAL 1\n"),
        ] {
            fs::write(directory.join(name), text).unwrap();
        }
        let expected = ErrorCounters { correctable: 3, non_fatal: u64::MAX, fatal: 1 };
        assert_eq!(errors.counters(address).unwrap(), Some(expected));
        fs::write(directory.join("aer_dev_fatal"), "TOTAL_ERR_FATAL -1\n").unwrap();
        assert!(errors.counters(address).is_err());
        fs::write(directory.join("aer_dev_fatal"), "TOTAL 1\n").unwrap();
        assert!(errors.counters(address).unwrap_err().to_string().contains("TOTAL_ERR_FATAL"));
    }

    #[test]
    fn errors_are_handled_where_a_port_has_an_aer_service_with_its_driver() {
        let root = tempfile::tempdir().unwrap();
        let errors = LinuxErrors::new(root.path().to_owned());
        let (with, without) = (Sbdf::from_devfn(0, 0, 8), Sbdf::from_devfn(0, 0, 16));
        let devices = root.path().join("bus/pci_express/devices");
        for (service, driver) in
            [(format!("{with}:pcie002"), "aer"), (format!("{without}:pcie001"), "pcie_pme")]
        {
            fs::create_dir_all(devices.join(&service)).unwrap();
            std::os::unix::fs::symlink(
                format!("../../drivers/{driver}"),
                devices.join(service).join("driver"),
            )
            .unwrap();
        }
        assert!(errors.handled(with).unwrap());
        assert!(!errors.handled(without).unwrap());
    }

    #[test]
    fn where_there_is_no_tracing_the_error_says_how_to_get_it() {
        let root = tempfile::tempdir().unwrap();
        let error = LinuxErrors::new(root.path().to_owned()).events().err().unwrap().to_string();
        assert!(error.contains("mount -t tracefs"), "{error}");
    }

    /// A directory with the files of an instance; a FIFO would block, so the pipe is a file with two events in it.
    #[test]
    fn an_instance_is_set_up_read_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let instance = root.path().join("kernel/tracing/instances").join(INSTANCE);
        fs::create_dir_all(instance.join("events/ras/aer_event")).unwrap();
        fs::write(instance.join("buffer_percent"), "50").unwrap();
        let event = "0000:01:10.2 PCIe Bus Error: severity=Fatal, , TLP Header=Not available\n";
        fs::write(instance.join("trace_pipe"), format!("CPU:1 [LOST 3 EVENTS]\n{BEGIN}{event}")).unwrap();
        let events = LinuxErrors::new(root.path().to_owned()).events().unwrap();
        assert_eq!(fs::read_to_string(instance.join("buffer_percent")).unwrap(), "0");
        assert_eq!(fs::read_to_string(instance.join("events/ras/aer_event/enable")).unwrap(), "1");
        assert_eq!(events.next_event(), Some(ErrorEvent::Lost));
        assert_eq!(events.next_event(), fault("01:10.2", Severity::Fatal, 0));
        assert_eq!(events.next_event(), None);
    }
}
