//! Damaged files of the service's own: any bytes where a record, a note or a copy should be.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use pciback::config::Access;
use pciback::platform::sim::Simulation;
use pciback::platform::{HostFunction, PAGE, Platform};
use pciback::{DomId, Sbdf};
use serde::Serialize;
use toolstack::device::Device;
use toolstack::engine::noted_server;
use toolstack::former_owners::FormerOwners;
use toolstack::journal::{Grant, Journal, JournalError, Record};
use toolstack::ledger::Ledger;
use toolstack::persistent_settings::PersistentSettings;
use toolstack::policies;
use toolstack::reservations::Reservations;
use toolstack::saved::SavedGuest;
use toolstack::settings::{self, Settings};

use crate::files::Folder;

/// The function that the files are about, and the boot in which they were written.
const ADDRESS: Sbdf = Sbdf::from_devfn(0, 1, 0);
const NAME: &str = "0000:01:00.0.json";
const BOOT: &str = "this boot";
/// A host that has it.
const HOST: &str =
    "{drivers: [igb], functions: [{address: 01:00.0, model: nvme}], domains: [{id: 1, name: web}]}";

static PLATFORM: LazyLock<Platform> =
    LazyLock::new(|| Simulation::from_yaml(HOST).expect("a host").platform("fuzzing").expect("a platform"));

fn function() -> HostFunction {
    PLATFORM.host.function(ADDRESS).expect("a function of the host")
}

fn device() -> Device {
    static DEVICE: LazyLock<Device> =
        LazyLock::new(|| Device::of(PLATFORM.host.as_ref(), &function()).expect("a device"));
    DEVICE.clone()
}

/// The first byte says which file it is. One that is refused is named in the error, and stays; of one that is accepted, all is possible,
/// and it is read again as it was.
pub fn state_file(data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else { return };
    match choice % 9 {
        0 => journal(bytes),
        1 => ledger(bytes),
        2 => former_owners(bytes),
        3 => reservations(bytes),
        4 => persistent_settings(bytes),
        5 => saved_guest(bytes),
        6 => copy_of_settings(bytes),
        7 => copy_of_policies(bytes),
        _ => note(bytes),
    }
}

fn put(folder: &str, name: &str, bytes: &[u8]) -> PathBuf {
    Folder::shared().with(folder, name, bytes)
}

fn written(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec_pretty(value).expect("a value of ours")
}

/// Errors name the file, which is as it was.
fn check_errors(errors: &[JournalError], folder: &Path, bytes: &[u8]) {
    for error in errors {
        assert_eq!(error.path(), folder.join(NAME));
        assert_eq!(error.address(), Some(ADDRESS));
        check_text(&error.to_string());
        assert_eq!(std::fs::read(folder.join(NAME)).expect("the file"), bytes, "a damaged file was changed");
    }
}

fn check_text(text: &str) {
    assert!(text.chars().count() < 4000 && !text.contains(char::is_control), "{text:?}");
}

fn read_journal(bytes: &[u8]) -> (Vec<Record>, Vec<JournalError>, PathBuf) {
    let folder = put("journal", NAME, bytes);
    let read = Journal::open(&folder).and_then(|journal| journal.read_all());
    let (records, errors) = read.expect("a folder that can be read");
    (records, errors, folder)
}

fn journal(bytes: &[u8]) {
    let (records, errors, folder) = read_journal(bytes);
    assert!(records.len() + errors.len() <= 1);
    check_errors(&errors, &folder, bytes);
    let Some(record) = records.first() else { return };
    assert_eq!(record.address, ADDRESS);
    for grant in &record.grants {
        match *grant {
            Grant::Iomem { first, frames } => {
                let end = first.checked_add(frames).and_then(|end| end.checked_mul(PAGE));
                assert!(frames > 0 && end.is_some(), "{grant:?}");
            }
            Grant::Ioport { first, count } => {
                assert!(
                    count > 0 && first.checked_add(count).is_some_and(|end| end <= 0x1_0000),
                    "{grant:?}"
                );
            }
            Grant::Gsi { .. } => {}
        }
    }
    for register in record.pristine.iter().flatten() {
        let access = Access::new(register.offset.into(), register.width.into());
        assert!(access.is_ok(), "{register:?}");
    }
    assert_eq!(read_journal(&written(record)).0, [record.clone()]);
}

fn ledger(bytes: &[u8]) {
    let read = |bytes: &[u8]| {
        let folder = put("ledger", NAME, bytes);
        let ledger = Ledger::open(&folder, BOOT).expect("a folder that can be read");
        (ledger.entry(ADDRESS), ledger.entries(), folder)
    };
    let (entry, entries, folder) = read(bytes);
    match entry {
        Err(error) => {
            check_errors(&[error], &folder, bytes);
            assert!(entries.is_err());
        }
        Ok(None) => assert!(entries.expect("no entry").is_empty()),
        Ok(Some(entry)) => {
            assert_eq!(entries.expect("one entry"), [entry.clone()]);
            for before in &entry.before {
                assert!(Access::new(before.offset.into(), before.width.into()).is_ok(), "{before:?}");
            }
            assert_eq!(read(&written(&entry)).0.expect("an entry of ours"), Some(entry));
        }
    }
}

fn former_owners(bytes: &[u8]) {
    let folder = put("former-owners", NAME, bytes);
    let (owners, errors) = FormerOwners::open(&folder, BOOT).expect("a folder that can be read");
    check_errors(&errors, &folder, bytes);
    let hypervisor = PLATFORM.hypervisor.as_ref();
    let found = owners.of(hypervisor, &function(), None).expect("a hypervisor that answers");
    assert!(found.iter().all(|owner| owner.had == ADDRESS && owner.domain != DomId::DOM0));
    let refused = owners.refuse(hypervisor, &function(), None, "attach it", |_| None);
    // What cannot be read is not nobody.
    assert_eq!(refused.is_err(), !errors.is_empty() || !found.is_empty());
}

fn reservations(bytes: &[u8]) {
    let read = |bytes: &[u8]| {
        let folder = put("persistent", NAME, bytes);
        let (reservations, errors) = Reservations::open(&folder).expect("a folder that can be read");
        (reservations, errors, folder)
    };
    let (reservations, errors, folder) = read(bytes);
    check_errors(&errors, &folder, bytes);
    assert_eq!(reservations.damaged(ADDRESS).is_some(), !errors.is_empty());
    let all = reservations.all();
    assert_eq!(all.len() + errors.len(), 1);
    let Some(one) = all.first() else { return };
    check_text(&one.who());
    assert_eq!(one.saved.is_some(), one.saved_at().is_some(), "it was saved at no time");
    let _ = (one.is_of(&device()), one.given_in(BOOT), one.called());
    assert_eq!(reservations.of(one.guest), all);
    assert_eq!(read(&written(one)).0.all(), all);
}

fn persistent_settings(bytes: &[u8]) {
    let path = put("settings", "wanted.json", bytes).join("wanted.json");
    let (settings, problem) = PersistentSettings::open(path.clone());
    let found = settings.of(PLATFORM.host.as_ref(), &function());
    let Some(error) = problem else { return };
    check_text(&error.to_string());
    assert_eq!(found, None);
    assert!(settings.change(device(), |one| one.hold = true).is_err());
    assert_eq!(std::fs::read(path).expect("the file"), bytes, "a damaged file was changed");
}

fn saved_guest(bytes: &[u8]) {
    let checkpoint = put("saved", "web.save.xpci", bytes).join("web.save");
    let guest = match SavedGuest::read(&checkpoint) {
        Ok(guest) => guest,
        Err(failure) => return check_text(&failure.to_string()),
    };
    assert!(guest.functions.len() <= 32 && guest.check().is_ok());
    check_text(&guest.called());
    for function in &guest.functions {
        if let Some(why) = function.difference(PLATFORM.host.as_ref(), &self::function()).expect("a host") {
            check_text(&why);
        }
    }
    put("saved", "web.save.xpci", &written(&guest));
    assert_eq!(SavedGuest::read(&checkpoint).expect("a file of ours"), guest);
}

fn copy_of_settings(bytes: &[u8]) {
    let folder = put("copy", "settings-in-force", bytes);
    if let Some(settings) = settings::read_copy(&folder) {
        assert!((1..=600).contains(&settings.guest_limit_seconds));
    }
}

fn copy_of_policies(bytes: &[u8]) {
    let folder = put("copy", "policies-in-force", bytes);
    let _ = policies::read_copy(&folder);
}

fn note(bytes: &[u8]) {
    let run_directory = put("run", "other", b"");
    Folder::shared().with("run/ioreq-servers", "1", bytes);
    let settings = Settings { run_directory, ..Settings::default() };
    let _ = noted_server(&settings, DomId(1));
}
