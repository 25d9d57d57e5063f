//! A QEMU in which a guest's processors do what processors do: Debian's sources with corrections, built once and kept in the cache.
//! CONTRIBUTING.md has what is wrong there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};

use crate::apt::Apt;
use crate::packages::{self, run};

/// The release whose sources are taken, on any host. Its meson is taken with them: an older release's is too old for them, and it is Python.
const SUITE: &str = "trixie";

/// A mistake and its correction, which is made as a whole or not at all.
struct Correction {
    mistake: &'static str,
    changes: &'static [Change],
}

/// A file, what stands there and how often, and what takes its place.
type Change = (&'static str, &'static str, usize, &'static str);

const SVM: &str = "target/i386/tcg/system/svm_helper.c";
const TLB: &str = "accel/tcg/cputlb.c";

const CORRECTIONS: [Correction; 5] = [
    Correction {
        mistake: "a read of CR2 is looked up among intercepts as one of CR0, whose exit code is 0",
        changes: &[(
            "target/i386/tcg/decode-new.c.inc",
            "if (decode->e.intercept) {",
            2,
            "if (decode->e.has_intercept) {",
        )],
    },
    Correction {
        mistake: "an injected interrupt that has been delivered is noted as one to be delivered",
        changes: &[(
            SVM,
            "do_interrupt_x86_hardirq(env, vector, 1);\n",
            1,
            "do_interrupt_x86_hardirq(env, vector, 1);\n            cs->exception_index = -1;\n",
        )],
    },
    Correction {
        mistake: "interrupts that another thread requests while a vCPU enters a guest are lost",
        changes: &[
            (
                SVM,
                "cs->interrupt_request |= CPU_INTERRUPT_VIRQ;\n",
                1,
                "bql_lock();\n        cs->interrupt_request |= CPU_INTERRUPT_VIRQ;\n        bql_unlock();\n",
            ),
            (SVM, "#include \"qemu/log.h\"\n", 1, "#include \"qemu/log.h\"\n#include \"qemu/main-loop.h\"\n"),
        ],
    },
    Correction {
        mistake: "a vCPU that loads the FPU's state writes to flags of the first vCPU, which may be changing them",
        changes: &[(
            "target/i386/tcg/system/fpu_helper.c",
            "    env->hflags2 &= ~HF2_IGNNE_MASK;\n",
            1,
            "    if (env->hflags2 & HF2_IGNNE_MASK) {\n        env->hflags2 &= ~HF2_IGNNE_MASK;\n    }\n",
        )],
    },
    Correction {
        mistake: "an access goes to another device when the memory map is being changed",
        changes: &[
            (
                "include/hw/core/cpu.h",
                "    hwaddr xlat_section;\n",
                1,
                "    hwaddr xlat_section;\n    struct MemoryRegionSection *section;\n",
            ),
            (
                TLB,
                "    full->xlat_section = iotlb - addr_page;\n",
                1,
                "    full->xlat_section = iotlb - addr_page;\n    full->section = section;\n",
            ),
            (
                TLB,
                "*out_offset, CPUState *cpu, hwaddr xlat,",
                1,
                "*out_offset, CPUState *cpu, CPUTLBEntryFull *full,",
            ),
            (
                TLB,
                "section = iotlb_to_section(cpu, xlat, attrs);\n    mr_offset = (xlat & TARGET_PAGE_MASK) + addr;",
                1,
                "section = full->section;\n    mr_offset = (full->xlat_section & TARGET_PAGE_MASK) + addr;",
            ),
            (
                TLB,
                "io_prepare(&mr_offset, cpu, full->xlat_section, attrs",
                4,
                "io_prepare(&mr_offset, cpu, full, attrs",
            ),
        ],
    },
];

/// What the lab's machines use of QEMU; the devices are QEMU's usual ones.
const OPTIONS: [&str; 12] = [
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-system",
    "--enable-tcg",
    "--enable-slirp",
    "--enable-pixman",
    "--disable-docs",
    "--disable-tools",
    "--disable-debug-info",
    "--disable-werror",
    "--disable-install-blobs",
    // Where the firmware of the host's packages is.
    "--firmwarepath=/usr/share/qemu:/usr/share/seabios:/usr/lib/ipxe/qemu",
];

const PROGRAM: &str = "qemu-system-x86_64";
/// What changes here makes another QEMU.
const THIS_FILE: &str = include_str!("patched.rs");

/// The program, made or taken from the cache.
pub fn qemu() -> Result<PathBuf> {
    let _lock = packages::lock_by("qemu-lock")?;
    let cache = packages::cache()?;
    let folder = cache.join("qemu-patched");
    let program = folder.join(PROGRAM);
    if fs::read_to_string(folder.join("key")).is_ok_and(|found| found == THIS_FILE) {
        return Ok(program);
    }
    println!("lab: building a QEMU with corrections, which takes 3 to 15 minutes");
    let work = tempfile::Builder::new().prefix("qemu-new-").tempdir_in(&cache)?;
    let new = work.path().join("new");
    fs::create_dir(&new)?;
    let sources = sources(&cache, work.path())?;
    correct(&sources)?;
    let built = build(&sources, work.path(), &cache.join("qemu-patched.log"))?;
    fs::copy(built, new.join(PROGRAM))?;
    fs::write(new.join("key"), THIS_FILE)?;
    if folder.exists() {
        fs::rename(&folder, work.path().join("old"))?;
    }
    fs::rename(&new, &folder)?;
    Ok(program)
}

/// QEMU's sources with Debian's changes, and meson, below `work`.
fn sources(cache: &Path, work: &Path) -> Result<PathBuf> {
    let apt = Apt::open_sources(&cache.join("apt"), SUITE)
        .with_context(|| format!("QEMU's sources ({SUITE}) cannot be had from this machine's apt mirror"))?;
    let debs = work.join("debs");
    fs::create_dir(&debs)?;
    apt.download_source("qemu", &debs)?;
    let mut meson = apt.resolve(&["meson"])?;
    meson.retain(|package| package.name == "meson");
    apt.download(&meson, &debs)?;
    let named = |end: &str| -> Result<PathBuf> {
        let files = fs::read_dir(&debs)?.flatten().map(|entry| entry.path());
        let mut found = files.filter(|path| path.to_string_lossy().ends_with(end));
        found.next().with_context(|| format!("apt downloaded no file *{end}"))
    };
    let sources = work.join("sources");
    // apt has checked it, by the checksums of the signed list.
    run(Command::new("dpkg-source").args(["--no-check", "-x"]).arg(named(".dsc")?).arg(&sources))?;
    run(Command::new("dpkg").arg("-x").arg(named(".deb")?).arg(work.join("meson")))?;
    Ok(sources)
}

/// Makes the corrections. What a newer version of Debian's has otherwise stays as it is, and is named: it may have been corrected there.
fn correct(sources: &Path) -> Result<()> {
    for correction in &CORRECTIONS {
        let mut files: BTreeMap<PathBuf, String> = BTreeMap::new();
        let mut fits = true;
        for (file, before, count, after) in correction.changes {
            let path = sources.join(file);
            let text = match files.remove(&path) {
                Some(text) => text,
                None => fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?,
            };
            fits &= text.matches(before).count() == *count;
            files.insert(path, text.replace(before, after));
        }
        if !fits {
            println!(
                "lab: QEMU's sources are others than was expected where {}: not corrected",
                correction.mistake
            );
            continue;
        }
        for (path, text) in files {
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        }
    }
    Ok(())
}

fn build(sources: &Path, work: &Path, log: &Path) -> Result<PathBuf> {
    let (folder, python) = (work.join("build"), work.join("python"));
    fs::create_dir(&folder)?;
    // configure takes meson from the site-packages of the Python that it is given.
    run(Command::new("python3").args(["-m", "venv", "--without-pip"]).arg(&python))?;
    let site = run(Command::new(python.join("bin/python3"))
        .args(["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]))?;
    let meson = work.join("meson/usr/lib/python3/dist-packages/.");
    run(Command::new("cp").arg("-R").arg(meson).arg(String::from_utf8_lossy(&site).trim()))?;

    let mut configure = Command::new(sources.join("configure"));
    configure.args(OPTIONS).arg("--disable-download");
    configure.arg(format!("--python={}", python.join("bin/python3").display()));
    logged(configure.current_dir(&folder), log, "configuring QEMU")?;
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let mut ninja = Command::new("ninja");
    ninja.arg(format!("-j{processors}")).arg(PROGRAM);
    logged(ninja.current_dir(&folder), log, "building QEMU")?;
    Ok(folder.join(PROGRAM))
}

/// Runs a program that says more than anybody reads.
fn logged(command: &mut Command, log: &Path, what: &str) -> Result<()> {
    let output = File::create(log).with_context(|| format!("creating {}", log.display()))?;
    let errors = output.try_clone()?;
    let status = command.stdin(Stdio::null()).stdout(output).stderr(errors).status();
    let status = status.with_context(|| format!("{what}: `make lab-test` installs what this needs"))?;
    if !status.success() {
        let said = fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        bail!("{what} failed ({status}):\n{}", lines[lines.len().saturating_sub(25)..].join("\n"));
    }
    Ok(())
}
