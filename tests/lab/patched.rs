//! A QEMU in which Linux boots as an HVM guest: Debian's sources with corrections of the mistakes that prevent it, built once and kept
//! in the cache. CONTRIBUTING.md has what is wrong there.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::apt::Apt;
use crate::packages::{self, run};

/// The release whose sources are taken, on any host. Its meson is taken with them: an older release's is too old for them, and it is Python.
const SUITE: &str = "trixie";

/// What stands in which file how often, and what takes its place.
const PATCHES: [(&str, &str, usize, &str); 2] = [
    // A read of CR2 is looked up among intercepts as such, not as one of CR0, whose exit code is 0.
    ("target/i386/tcg/decode-new.c.inc", "if (decode->e.intercept) {", 2, "if (decode->e.has_intercept) {"),
    // An injected interrupt that has been delivered is no longer noted as one to be delivered.
    (
        "target/i386/tcg/system/svm_helper.c",
        "do_interrupt_x86_hardirq(env, vector, 1);\n",
        1,
        "do_interrupt_x86_hardirq(env, vector, 1);\n            cs->exception_index = -1;\n",
    ),
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
    println!("lab: building a QEMU in which Linux boots as an HVM guest; this takes 10 to 30 minutes");
    let work = tempfile::Builder::new().prefix("qemu-new-").tempdir_in(&cache)?;
    let new = work.path().join("new");
    fs::create_dir(&new)?;
    let sources = sources(&cache, work.path())?;
    patch(&sources)?;
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

fn patch(sources: &Path) -> Result<()> {
    for (file, mistake, count, correction) in PATCHES {
        let path = sources.join(file);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let found = text.matches(mistake).count();
        ensure!(found == count, "{file} of QEMU has {mistake:?} {found} times, not {count}: look at PATCHES");
        fs::write(&path, text.replace(mistake, correction))?;
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
    let status = status.with_context(|| format!("{what}: `make test-long` installs what this needs"))?;
    if !status.success() {
        let said = fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        bail!("{what} failed ({status}):\n{}", lines[lines.len().saturating_sub(25)..].join("\n"));
    }
    Ok(())
}
