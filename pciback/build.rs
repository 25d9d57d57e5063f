//! Writes the Rust bindings of the Xen libraries from the installed headers (Debian: `libxen-dev`).
//!
//! The libraries are loaded when a real host is opened, not linked: libxenctrl changes its name with every release of
//! Xen, and the binaries must start on machines without Xen. Every function that is used is named once, here; from
//! this list come the binding and the check, made once when the library is loaded, that it has them all.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use bindgen::{Builder, RustEdition};

/// A library and the functions of it that are used.
struct Library {
    /// The type that holds its functions.
    name: &'static str,
    /// The file that is written.
    file: &'static str,
    functions: &'static [&'static str],
}

const LIBRARIES: [Library; 7] = [
    Library {
        name: "XenCtrl",
        file: "xenctrl.rs",
        functions: &[
            "xc_interface_open",
            "xc_interface_close",
            "xc_assign_device",
            "xc_deassign_device",
            "xc_test_assign_device",
            "xc_domain_iomem_permission",
            "xc_domain_ioport_permission",
            "xc_domain_irq_permission",
            "xc_domain_getinfolist",
            "xc_domain_memory_mapping",
            "xc_domain_maximum_gpfn",
            "xc_domain_ioport_mapping",
            "xc_domain_update_msi_irq",
            "xc_domain_unbind_msi_irq",
            "xc_domain_bind_pt_pci_irq",
            "xc_domain_unbind_pt_irq",
            "xc_domain_unbind_pt_spi_irq",
            "xc_physdev_map_pirq",
            "xc_physdev_unmap_pirq",
            "xc_pcitopoinfo",
            "xc_version",
            "xc_domain_pause",
            "xc_domain_unpause",
            "xc_domain_destroy",
        ],
    },
    Library {
        name: "XenCall",
        file: "xencall.rs",
        functions: &[
            "xencall_open",
            "xencall_close",
            "xencall2",
            "xencall_alloc_buffer",
            "xencall_free_buffer",
        ],
    },
    Library {
        name: "XenGntTab",
        file: "xengnttab.rs",
        functions: &["xengnttab_open", "xengnttab_close", "xengnttab_map_grant_ref", "xengnttab_unmap"],
    },
    Library {
        name: "XenEvtchn",
        file: "xenevtchn.rs",
        functions: &[
            "xenevtchn_open",
            "xenevtchn_close",
            "xenevtchn_fd",
            "xenevtchn_bind_interdomain",
            "xenevtchn_unbind",
            "xenevtchn_pending",
            "xenevtchn_unmask",
            "xenevtchn_notify",
        ],
    },
    Library {
        name: "XenDeviceModel",
        file: "xendevicemodel.rs",
        functions: &[
            "xendevicemodel_open",
            "xendevicemodel_close",
            "xendevicemodel_create_ioreq_server",
            "xendevicemodel_get_ioreq_server_info",
            "xendevicemodel_destroy_ioreq_server",
            "xendevicemodel_set_ioreq_server_state",
            "xendevicemodel_map_pcidev_to_ioreq_server",
            "xendevicemodel_unmap_pcidev_from_ioreq_server",
            "xendevicemodel_map_io_range_to_ioreq_server",
            "xendevicemodel_unmap_io_range_from_ioreq_server",
            "xendevicemodel_shutdown",
        ],
    },
    Library {
        name: "XenForeignMemory",
        file: "xenforeignmemory.rs",
        functions: &[
            "xenforeignmemory_open",
            "xenforeignmemory_close",
            "xenforeignmemory_map",
            "xenforeignmemory_unmap",
            "xenforeignmemory_map_resource",
            "xenforeignmemory_unmap_resource",
        ],
    },
    Library {
        name: "XenStore",
        file: "xenstore.rs",
        functions: &[
            "xs_open",
            "xs_close",
            "xs_read",
            "xs_directory",
            "xs_write",
            "xs_rm",
            "xs_get_permissions",
            "xs_set_permissions",
            "xs_transaction_start",
            "xs_transaction_end",
            "xs_watch",
            "xs_unwatch",
            "xs_is_domain_introduced",
            "xs_fileno",
            "xs_check_watch",
        ],
    },
];

/// The types in the functions' signatures, and the arguments of hypercalls.
const TYPES: &str = "xentoollog_logger|xc_interface|xencall_handle|xengnttab_handle|xenevtchn_(handle|port_or_error_t)|\
     evtchn_port_t|xs_handle|xs_transaction_t|xs_permissions|physdev_pci_device(_t|_add)?|physdev_map_pirq|xc_domaininfo_t|\
     xendevicemodel_handle|xenforeignmemory_(resource_)?handle|ioservid_t|domid_t|xen_pfn_t|pt_irq_type|xen_hvm_get_mem_type";
const CONSTANTS: &str = "__HYPERVISOR_physdev_op|PHYSDEVOP_pci_device_(add|remove)|PHYSDEVOP_(prepare|release)_msix|\
     PHYSDEVOP_restore_msi_ext|PHYSDEVOP_map_pirq|MAP_PIRQ_TYPE_MSI_SEG|XEN_DOMCTL_DEV_RDM_RELAXED|\
     XEN_PCI_DEV_.*|XEN_INVALID_.*|XENVER_version|XS_PERM_(NONE|READ)|XBT_NULL|\
     XENMEM_resource_ioreq_server|XEN_DOMINF_(paused|dying|shutdown(mask|shift)?|hap|hvm_guest)|__HYPERVISOR_hvm_op|HVMOP_get_mem_type";

const HEADER: &str = "xen.h";

fn main() -> Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", header()?.display());
    let out = PathBuf::from(env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?);

    write(&out.join("types.rs"), types()?)?;
    for library in &LIBRARIES {
        let mut text = functions(library)?;
        text.push_str(&symbols_check(library)?);
        write(&out.join(library.file), text)?;
    }
    Ok(())
}

fn header() -> Result<PathBuf> {
    let manifest = env::var_os("CARGO_MANIFEST_DIR").context("cargo sets CARGO_MANIFEST_DIR")?;
    Ok(Path::new(&manifest).join("src/platform/xen").join(HEADER))
}

fn builder() -> Result<Builder> {
    Ok(bindgen::builder()
        .header(header()?.to_string_lossy())
        .rust_edition(RustEdition::Edition2024)
        .wrap_unsafe_ops(true)
        .merge_extern_blocks(true)
        .generate_comments(false)
        .layout_tests(true))
}

/// All types and constants, once: the libraries share them.
fn types() -> Result<String> {
    generate(builder()?.ignore_functions().allowlist_type(TYPES).allowlist_var(CONSTANTS))
}

fn functions(library: &Library) -> Result<String> {
    let builder = builder()?
        .allowlist_recursively(false)
        .dynamic_library_name(library.name)
        .dynamic_link_require_all(false)
        .raw_line("use super::types::*;");
    generate(
        library.functions.iter().fold(builder, |builder, function| builder.allowlist_function(*function)),
    )
}

fn generate(builder: Builder) -> Result<String> {
    let bindings = builder.generate().context(
        "cannot read the headers of the Xen libraries; install the packages libxen-dev and libclang-dev",
    )?;
    Ok(bindings.to_string())
}

/// The first of the library's functions that it lacks; calling such a function would panic.
fn symbols_check(library: &Library) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "impl {} {{", library.name)?;
    writeln!(text, "    pub fn missing(&self) -> Option<&'static str> {{")?;
    for function in library.functions {
        writeln!(text, "        if self.{function}.is_err() {{ return Some(\"{function}\"); }}")?;
    }
    writeln!(text, "        None\n    }}\n}}")?;
    Ok(text)
}

fn write(path: &Path, text: String) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}
