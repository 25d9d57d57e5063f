//! udev in dom0, as on a host: its daemon with the product's rules and the one that loads drivers.

use std::io::Write;

use anyhow::Result;

use crate::cpio::Archive;
use crate::image::Programs;
use crate::{logs, packages};

const DAEMON: &str = "/usr/lib/systemd/systemd-udevd";
/// Of the rules that come with udev only these: most of the others want programs that are not here.
const DRIVERS: &str = "/usr/lib/udev/rules.d/80-drivers.rules";
const OURS: &str = "90-xpci.rules";

/// Adds it to dom0's initramfs.
pub fn add(archive: &mut Archive<impl Write>, trees: &packages::Trees) -> Result<()> {
    let trees = {
        let _lock = packages::lock()?;
        trees.clone().with_udev()?
    };
    Programs::new(&trees).add(archive, "/bin/udevadm", &trees.find("/bin/udevadm")?)?;
    // One program with two names.
    archive.link(DAEMON, "/bin/udevadm")?;
    archive.copy(DRIVERS, &trees.find(DRIVERS)?, 0o644)?;
    archive.copy(
        &format!("/usr/lib/udev/rules.d/{OURS}"),
        &logs::workspace().join("udev-rules").join(OURS),
        0o644,
    )
}
