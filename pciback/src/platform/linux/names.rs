//! What people call functions: udev's hardware database, which is made of the pci.ids file.

use std::ffi::OsStr;

use udev::Hwdb;

use crate::host::{HostFunction, Names};

/// The longest name that is shown, in characters.
const LONGEST: usize = 120;

/// The names of functions, in their order; none where the host has no database.
pub fn names(functions: &[HostFunction]) -> Vec<Names> {
    let Ok(database) = Hwdb::new() else { return vec![Names::default(); functions.len()] };
    functions.iter().map(|function| names_of(&database, function)).collect()
}

fn names_of(database: &Hwdb, function: &HostFunction) -> Names {
    let mut names = Names::default();
    for entry in database.query(modalias(function)) {
        let text = printable(entry.value());
        match entry.name().to_str() {
            Some("ID_VENDOR_FROM_DATABASE") => names.vendor = text,
            Some("ID_MODEL_FROM_DATABASE") => names.device = text,
            Some("ID_PCI_SUBCLASS_FROM_DATABASE") => names.class = text,
            _ => {}
        }
    }
    names
}

fn printable(text: &OsStr) -> Option<String> {
    let text: String = text.to_str()?.chars().filter(|char| !char.is_control()).take(LONGEST).collect();
    Some(text).filter(|text| !text.is_empty())
}

/// The kernel's name for the kind of function, by which the database is asked (`MODALIAS` of PCI devices).
fn modalias(function: &HostFunction) -> String {
    let [_, class, subclass, interface] = function.class.to_be_bytes();
    format!(
        "pci:v{:08X}d{:08X}sv{:08X}sd{:08X}bc{class:02X}sc{subclass:02X}i{interface:02X}",
        function.vendor, function.device, function.subsystem_vendor, function.subsystem
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sbdf;
    use crate::host::Resource;

    fn function() -> HostFunction {
        HostFunction {
            address: Sbdf::from_devfn(0, 1, 0),
            incarnation: 1,
            vendor: 0x8086,
            device: 0x10c9,
            subsystem_vendor: 0x8086,
            subsystem: 0xa03c,
            class: 0x02_0000,
            revision: 1,
            resources: [Resource::default(); 13],
            driver: None,
            driver_override: None,
            irq: 0,
            physical_function: None,
            virtual_functions: Vec::new(),
            total_vfs: 0,
            num_vfs: 0,
            numa_node: None,
            reset_methods: Vec::new(),
            interfaces: Vec::new(),
        }
    }

    #[test]
    fn the_database_is_asked_by_the_modalias_that_the_kernel_makes() {
        assert_eq!(modalias(&function()), "pci:v00008086d000010C9sv00008086sd0000A03Cbc02sc00i00");
    }

    #[test]
    fn there_is_one_answer_for_each_function_with_or_without_a_database() {
        assert_eq!(names(&[function(), function()]).len(), 2);
    }

    #[test]
    fn names_are_printable_and_not_endless() {
        assert_eq!(printable(OsStr::new("A\x1b[31mB\n")).as_deref(), Some("A[31mB"));
        assert_eq!(printable(OsStr::new(&"x".repeat(500))).unwrap().len(), LONGEST);
        assert_eq!(printable(OsStr::new("")), None);
    }
}
