//! Device models in dom0: QEMU, over QMP.
//!
//! QEMU's ACPI hotplug controller notifies the guest when `device_add` and `device_del` are executed, and deletes a device when the guest
//! writes its number to the eject register. That register is written here as well, where the guest is not asked.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use serde_json::{Value, json};

use super::qmp::{Conversation, connect_to, connect_within};
use crate::config::{Access, Width};
use crate::platform::{Cause, DeviceModels, PlatformError, Result};
use crate::{Devfn, DeviceNumber, DomId};

/// QEMU's device without any effect on the host. Nothing of it is in the state that QEMU saves for `xl save`.
const PLACEHOLDER: &str = "pci-testdev";
/// What its names begin with.
const NAMED: &str = "xpci-";
/// The bus of all guests' devices (`i440fx.c`).
const BUS: &str = "pci.0";
/// QEMU's register that ejects devices, a bit for each device number (`docs/specs/acpi_pci_hotplug`).
const EJECT: u16 = 0xae08;
/// QEMU's register that selects what port CFC reaches.
const CONFIG_ADDRESS: u16 = 0xcf8;
/// The first of the ports that reach what is selected.
const CONFIG_DATA: u16 = 0xcfc;
/// The bit of CONFIG_ADDRESS with which it selects something (PCI Local Bus 3.0, section 3.2.2.3.2).
const CONFIG_ENABLE: u32 = 1 << 31;
/// How long QEMU is left to others between two looks at whether the guest has ejected a device: it talks to one client at a time, so nobody
/// may wait for its event.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);
/// What QEMU says where the guest was asked before and has not answered.
const ASKED_BEFORE: &str = "already in the process of unplug";

/// QEMU processes in dom0.
#[derive(Default)]
pub struct QemuDeviceModels {
    /// What guests were asked to release, and may have ejected since.
    asked: Mutex<BTreeSet<(DomId, DeviceNumber)>>,
}

impl QemuDeviceModels {
    fn asked(&self) -> MutexGuard<'_, BTreeSet<(DomId, DeviceNumber)>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DeviceModels for QemuDeviceModels {
    fn slots(&self, domain: DomId) -> Result<Vec<DeviceNumber>> {
        let slots = connect_to(domain)
            .and_then(|mut model| model.own_functions())
            .map(|own| own.into_iter().map(Devfn::device).collect());
        slots.map_err(|cause| {
            PlatformError::new("ask for its devices the device model of domain", domain, cause)
        })
    }

    fn announce(&self, domain: DomId, slot: DeviceNumber) -> Result<()> {
        self.asked().remove(&(domain, slot));
        let plugged = connect_to(domain).and_then(|mut model| model.plug(slot));
        plugged.map_err(|cause| {
            let subject = format!("device {slot:x} of domain {domain}");
            PlatformError::new("plug a placeholder at", subject, cause)
        })
    }

    fn request_eject(&self, domain: DomId, slot: DeviceNumber, limit: Duration) -> Result<bool> {
        let look = || Ok(!connect_to(domain)?.has_placeholder(slot)?);
        self.asked().insert((domain, slot));
        let released = connect_to(domain)
            .and_then(|mut model| model.request_eject(slot))
            .and_then(|released| if released { Ok(true) } else { holds_within(limit, look) });
        released.map_err(|cause| {
            let subject = format!("device {slot:x} of domain {domain}");
            PlatformError::new("ask for the release of", subject, cause)
        })
    }

    fn has_ejected(&self, domain: DomId, slot: DeviceNumber, limit: Duration) -> Result<bool> {
        if !self.asked().contains(&(domain, slot)) {
            return Ok(false);
        }
        let there = connect_within(domain, limit).and_then(|mut model| model.has_placeholder(slot));
        there.map(|there| !there).map_err(|cause| {
            let subject = format!("device {slot:x} of domain {domain}");
            PlatformError::new("find out whether its guest has released", subject, cause)
        })
    }

    fn forget(&self, domain: DomId, slot: DeviceNumber) {
        self.asked().remove(&(domain, slot));
    }

    fn eject(&self, domain: DomId, slot: DeviceNumber) -> Result<()> {
        let ejected = connect_to(domain).and_then(|mut model| model.eject(slot));
        ejected.map_err(|cause| {
            let subject = format!("device {slot:x} of domain {domain}");
            PlatformError::new("remove the placeholder at", subject, cause)
        })
    }

    fn functions(&self, domain: DomId, limit: Duration) -> Result<Vec<Devfn>> {
        let own = connect_within(domain, limit).and_then(|mut model| model.own_functions());
        own.map_err(|cause| {
            PlatformError::new("ask for its functions the device model of domain", domain, cause)
        })
    }

    fn read_config(&self, domain: DomId, function: Devfn, access: Access, limit: Duration) -> Result<u32> {
        let read = connect_within(domain, limit).and_then(|mut model| model.read_config(function, access));
        read.map_err(|cause| PlatformError::new("read config space of", of_model(domain, function), cause))
    }

    fn write_config(
        &self,
        domain: DomId,
        function: Devfn,
        access: Access,
        value: u32,
        limit: Duration,
    ) -> Result<()> {
        let written =
            connect_within(domain, limit).and_then(|mut model| model.write_config(function, access, value));
        written
            .map_err(|cause| PlatformError::new("write config space of", of_model(domain, function), cause))
    }
}

/// A device model's function in words.
fn of_model(domain: DomId, function: Devfn) -> String {
    format!("{function} of the device model of domain {domain}")
}

/// A function on bus 0.
#[derive(Debug, PartialEq, Eq)]
struct OnBus {
    function: Devfn,
    name: String,
}

impl OnBus {
    fn is_placeholder(&self) -> bool {
        self.name.starts_with(NAMED)
    }
}

/// The name of the placeholder at a device number.
fn name(slot: DeviceNumber) -> String {
    format!("{NAMED}{slot:x}")
}

impl Conversation {
    fn devices(&mut self) -> std::result::Result<Vec<OnBus>, Cause> {
        let buses = self.ask("query-pci", &json!({}))?;
        devices_of(&buses).ok_or_else(|| Cause::Malformed("query-pci lists no bus 0".to_owned()))
    }

    /// Its functions, without placeholders.
    fn own_functions(&mut self) -> std::result::Result<Vec<Devfn>, Cause> {
        let devices = self.devices()?;
        Ok(devices.into_iter().filter(|one| !one.is_placeholder()).map(|one| one.function).collect())
    }

    /// Has QEMU's monitor carry out a command, and returns what it prints.
    fn monitor(&mut self, line: &str) -> std::result::Result<Value, Cause> {
        self.ask("human-monitor-command", &json!({"command-line": line}))
    }

    /// Writes a register of QEMU's own devices, as the guest does.
    fn write(&mut self, port: u16, value: u32) -> std::result::Result<(), Cause> {
        self.monitor(&format!("o/w {port:#x} {value:#x}")).map(drop)
    }

    /// Does something with the register that QEMU's port CFC reaches meanwhile. The guest's own selection is elsewhere: the service has what
    /// it wrote to port CF8, and Xen has QEMU access functions without that port. But what the guest does to port CFC while it has selected
    /// nothing comes to QEMU, so that nothing may stay selected there.
    fn selected<T>(
        &mut self,
        function: Devfn,
        access: Access,
        body: impl FnOnce(&mut Self, u16) -> std::result::Result<T, Cause>,
    ) -> std::result::Result<T, Cause> {
        let address = CONFIG_ENABLE | u32::from(function.0) << 8 | u32::from(access.dword());
        self.write(CONFIG_ADDRESS, address)?;
        let outcome = body(self, CONFIG_DATA + (access.offset() & 3));
        let unselected = self.write(CONFIG_ADDRESS, 0);
        outcome.and_then(|value| unselected.map(|()| value))
    }

    fn read_config(&mut self, function: Devfn, access: Access) -> std::result::Result<u32, Cause> {
        self.selected(function, access, |model, port| {
            let printed = model.monitor(&format!("i/{} {port:#x}", size(access)))?;
            value_of(&printed).ok_or_else(|| Cause::Malformed("it prints no value of the port".to_owned()))
        })
    }

    fn write_config(
        &mut self,
        function: Devfn,
        access: Access,
        value: u32,
    ) -> std::result::Result<(), Cause> {
        self.selected(function, access, |model, port| {
            model.monitor(&format!("o/{} {port:#x} {value:#x}", size(access))).map(drop)
        })
    }

    fn has_placeholder(&mut self, slot: DeviceNumber) -> std::result::Result<bool, Cause> {
        let name = name(slot);
        Ok(self.devices()?.iter().any(|device| device.function.device() == slot && device.name == name))
    }

    fn plug(&mut self, slot: DeviceNumber) -> std::result::Result<(), Cause> {
        let name = name(slot);
        match self.devices()?.iter().find(|device| device.function.device() == slot) {
            // From an attachment whose end could not be completed: the guest is notified of a new device only.
            Some(device) if device.name == name => self.eject(slot)?,
            Some(_) => return Err(Errno::EBUSY.into()),
            None => {}
        }
        // The service has this register in QEMU's place. Through what the guest selected there before, it would reach the placeholder.
        self.write(CONFIG_ADDRESS, 0)?;
        let device = json!({"driver": PLACEHOLDER, "id": name, "bus": BUS, "addr": format!("{slot:x}")});
        self.ask("device_add", &device).map(drop)
    }

    /// Asks the guest; `true`: it has ejected the device before.
    fn request_eject(&mut self, slot: DeviceNumber) -> std::result::Result<bool, Cause> {
        match self.execute("device_del", &json!({"id": name(slot)}))? {
            Ok(_) => Ok(false),
            Err(refused) if refused.is_missing => Ok(true),
            Err(refused) if refused.why.contains(ASKED_BEFORE) => Ok(false),
            Err(refused) => Err(refused.into_cause()),
        }
    }

    fn eject(&mut self, slot: DeviceNumber) -> std::result::Result<(), Cause> {
        if !self.has_placeholder(slot)? {
            return Ok(());
        }
        self.write(EJECT, 1 << slot.get())?;
        match self.has_placeholder(slot)? {
            false => Ok(()),
            true => Err(Cause::Unavailable("QEMU has not deleted it".to_owned())),
        }
    }
}

/// Whether something holds within a limit. QEMU may be busy with others when it is looked at.
fn holds_within(
    limit: Duration,
    look: impl Fn() -> std::result::Result<bool, Cause>,
) -> std::result::Result<bool, Cause> {
    let deadline = Instant::now() + limit;
    loop {
        match look() {
            Ok(false) | Err(Cause::TimedOut(_)) if Instant::now() < deadline => thread::sleep(BETWEEN_LOOKS),
            Err(Cause::TimedOut(_)) => return Ok(false),
            outcome => return outcome,
        }
    }
}

/// Has one of the conversations with the device model at the other end of a stream, for the fuzz targets. The text says what came of it.
#[cfg(fuzzing)]
pub fn converse(
    stream: std::os::unix::net::UnixStream,
    limit: Duration,
    what: u8,
    function: Devfn,
    access: Access,
) -> std::result::Result<String, Cause> {
    let mut model = Conversation::begin(stream, limit)?;
    let slot = function.device();
    match what % 6 {
        0 => model.own_functions().map(|own| format!("{} functions", own.len())),
        1 => model.plug(slot).map(|()| "plugged".to_owned()),
        2 => model.request_eject(slot).map(|released| released.to_string()),
        3 => model.eject(slot).map(|()| "ejected".to_owned()),
        4 => model.read_config(function, access).map(|value| format!("{value:#x}")),
        _ => model.write_config(function, access, u32::MAX).map(|()| "written".to_owned()),
    }
}

fn devices_of(buses: &Value) -> Option<Vec<OnBus>> {
    let root = buses.as_array()?.iter().find(|bus| bus["bus"] == 0)?;
    let devices = root["devices"].as_array()?.iter().map(|device| {
        let slot = DeviceNumber::new(u8::try_from(device["slot"].as_u64()?).ok()?)?;
        let number = device["function"].as_u64().filter(|number| *number < 8)?;
        let function = Devfn(slot.devfn().0 | number as u8);
        Some(OnBus { function, name: device["qdev_id"].as_str().unwrap_or_default().to_owned() })
    });
    devices.collect()
}

/// How the monitor calls the size of an access.
const fn size(access: Access) -> char {
    match access.width() {
        Width::Byte => 'b',
        Width::Word => 'h',
        Width::Dword => 'w',
    }
}

/// The value in what the monitor prints of a port that it has read: `portl[0x0cfc] = 0x12378086`, in older versions 0 as digits only.
fn value_of(printed: &Value) -> Option<u32> {
    let (_, value) = printed.as_str()?.trim_end().rsplit_once("= ")?;
    u32::from_str_radix(value.strip_prefix("0x").unwrap_or(value), 16).ok()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::thread::{self, JoinHandle};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    /// A device model that answers each command by one of these lines, then closes. Its commands are what it was told.
    fn model(answers: &[&str]) -> (Conversation, JoinHandle<Vec<Value>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let answers: Vec<String> = answers.iter().map(|&line| line.to_owned()).collect();
        let told = thread::spawn(move || {
            let mut commands = BufReader::new(theirs.try_clone().unwrap()).lines();
            let mut writer = theirs;
            writer.write_all(b"{\"QMP\":{}}\n").unwrap();
            let mut told = Vec::new();
            for answer in [String::from("{\"return\":{}}")].into_iter().chain(answers) {
                let Some(Ok(line)) = commands.next() else { break };
                told.push(serde_json::from_str(&line).unwrap());
                writeln!(writer, "{answer}").unwrap();
            }
            told.split_off(1)
        });
        (Conversation::begin(ours, LIMIT).unwrap(), told)
    }

    const EMPTY: &str =
        r#"{"return":[{"bus":0,"devices":[{"slot":0,"function":0,"qdev_id":""},{"slot":3,"function":0}]}]}"#;
    const PLUGGED: &str = r#"{"return":[{"bus":0,"devices":[{"slot":0,"function":0,"qdev_id":""},{"slot":31,"function":0,"qdev_id":"xpci-1f"}]}]}"#;
    const DONE: &str = r#"{"return":{}}"#;

    #[test]
    fn devices_are_those_of_bus_0_and_placeholders_are_known_by_name() {
        let answer = json!([
            {"bus": 0, "devices": [{"slot": 1, "function": 3}, {"slot": 31, "function": 0, "qdev_id": "xpci-1f"}]},
            {"bus": 1, "devices": [{"slot": 9, "function": 0}]},
        ]);
        let found = devices_of(&answer).unwrap();
        let found: Vec<_> = found.iter().map(|device| (device.function.0, device.is_placeholder())).collect();
        assert_eq!(found, [(0xb, false), (0xf8, true)]);
        for malformed in [
            json!([]),
            json!([{"bus": 0}]),
            json!([{"bus": 0, "devices": [{"slot": 32, "function": 0}]}]),
            json!([{"bus": 0, "devices": [{"slot": 1, "function": 8}]}]),
            json!([{"bus": 0, "devices": [{"slot": 1}]}]),
        ] {
            assert_eq!(devices_of(&malformed), None, "{malformed}");
        }
    }

    #[test]
    fn a_placeholder_is_plugged_where_nothing_is_and_nothing_is_selected() {
        let (mut ours, told) = model(&[EMPTY, DONE, DONE]);
        ours.plug(DeviceNumber::LAST).unwrap();
        let told = told.join().unwrap();
        assert_eq!(told[1]["arguments"]["command-line"], "o/w 0xcf8 0x0");
        let device = json!({"driver": "pci-testdev", "id": "xpci-1f", "bus": "pci.0", "addr": "1f"});
        assert_eq!((&told[2]["execute"], &told[2]["arguments"]), (&json!("device_add"), &device));
        let (mut ours, told) = model(&[EMPTY]);
        assert!(matches!(ours.plug(DeviceNumber::new(3).unwrap()), Err(Cause::Os(Errno::EBUSY))));
        assert_eq!(told.join().unwrap().len(), 1, "something was plugged beside another device");
    }

    #[test]
    fn a_placeholder_that_is_left_is_replaced_so_that_the_guest_is_notified() {
        let (mut ours, told) = model(&[PLUGGED, PLUGGED, DONE, EMPTY, DONE, DONE]);
        ours.plug(DeviceNumber::LAST).unwrap();
        let told = told.join().unwrap();
        assert_eq!(told[2]["arguments"]["command-line"], "o/w 0xae08 0x80000000");
        assert_eq!(told[5]["execute"], "device_add");
    }

    #[test]
    fn a_guest_is_asked_once_or_again_unless_it_has_ejected_the_device_before() {
        for (answer, released) in [
            (DONE, false),
            (
                r#"{"error":{"class":"GenericError","desc":"xpci-1f is already in the process of unplug"}}"#,
                false,
            ),
            (r#"{"error":{"class":"DeviceNotFound","desc":"Device 'xpci-1f' not found"}}"#, true),
        ] {
            let (mut ours, told) = model(&[answer]);
            assert_eq!(ours.request_eject(DeviceNumber::LAST).unwrap(), released, "{answer}");
            assert_eq!(told.join().unwrap()[0]["arguments"], json!({"id": "xpci-1f"}));
        }
        let (mut ours, _told) = model(&[r#"{"error":{"class":"GenericError","desc":"no hotplug"}}"#]);
        let error = ours.request_eject(DeviceNumber::LAST).unwrap_err().to_string();
        assert!(error.contains("no hotplug"), "{error}");
    }

    #[test]
    fn a_placeholder_is_no_function_of_qemus_own() {
        let (mut ours, _told) = model(&[PLUGGED]);
        assert_eq!(ours.own_functions().unwrap(), [Devfn(0)]);
    }

    fn lines(told: JoinHandle<Vec<Value>>) -> Vec<String> {
        let told = told.join().unwrap();
        told.iter().map(|one| one["arguments"]["command-line"].as_str().unwrap().to_owned()).collect()
    }

    /// What `lspci` writes as 01.3, and its registers at 3c and 3e.
    const FUNCTION: Devfn = Devfn(0xb);

    #[test]
    fn a_register_is_read_through_the_ports_and_nothing_stays_selected() {
        for (offset, size, read, printed, value) in [
            (0x3c, 4, "i/w 0xcfc", "portl[0x0cfc] = 0x12378086\r\n", 0x1237_8086),
            (0x3e, 2, "i/h 0xcfe", "portw[0x0cfe] = 0x00ff\r\n", 0xff),
            (0x3f, 1, "i/b 0xcff", "portb[0x0cff] = 00\r\n", 0),
        ] {
            let printed = json!({"return": printed}).to_string();
            let (mut ours, told) = model(&[DONE, &printed, DONE]);
            let access = Access::new(offset, size).unwrap();
            assert_eq!(ours.read_config(FUNCTION, access).unwrap(), value);
            assert_eq!(lines(told), ["o/w 0xcf8 0x80000b3c", read, "o/w 0xcf8 0x0"]);
        }
    }

    #[test]
    fn a_register_is_written_through_the_ports_and_nothing_stays_selected() {
        for (offset, size, written) in
            [(0x04, 4, "o/w 0xcfc 0x7"), (0x06, 2, "o/h 0xcfe 0x7"), (0x05, 1, "o/b 0xcfd 0x7")]
        {
            let (mut ours, told) = model(&[DONE, DONE, DONE]);
            ours.write_config(FUNCTION, Access::new(offset, size).unwrap(), 7).unwrap();
            assert_eq!(lines(told), ["o/w 0xcf8 0x80000b04", written, "o/w 0xcf8 0x0"]);
        }
    }

    #[test]
    fn what_is_no_value_of_a_port_is_an_error() {
        for printed in [json!(""), json!("unknown command: 'i/w'"), json!("portl = 0x1ffffffff"), json!({})] {
            let answer = json!({"return": printed}).to_string();
            let (mut ours, _told) = model(&[DONE, &answer, DONE]);
            let read = ours.read_config(FUNCTION, Access::new(0, 4).unwrap());
            assert!(matches!(read, Err(Cause::Malformed(_))), "{printed}");
        }
    }

    #[test]
    fn qemu_is_looked_at_until_the_limit_also_when_it_is_busy_but_not_when_it_is_gone() {
        let looks = std::cell::RefCell::new(vec![Ok(true), Err(Cause::TimedOut(LIMIT)), Ok(false)]);
        let look = || looks.borrow_mut().pop().unwrap();
        assert!(holds_within(LIMIT, look).unwrap());
        assert!(!holds_within(Duration::ZERO, || Ok(false)).unwrap());
        assert!(!holds_within(Duration::ZERO, || Err(Cause::TimedOut(LIMIT))).unwrap());
        assert!(holds_within(LIMIT, || Err(Cause::Missing)).is_err());
    }

    #[test]
    fn ejecting_what_is_not_there_does_nothing_and_what_stays_is_an_error() {
        let (mut ours, told) = model(&[EMPTY]);
        ours.eject(DeviceNumber::LAST).unwrap();
        assert_eq!(told.join().unwrap().len(), 1);
        let (mut ours, _told) = model(&[PLUGGED, DONE, PLUGGED]);
        assert!(ours.eject(DeviceNumber::LAST).is_err());
    }
}
