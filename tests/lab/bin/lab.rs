//! Fetches the lab's packages, or boots it for a person.

use anyhow::Result;
use xpci_tests::image;
use xpci_tests::packages::XenVersion;

fn main() -> Result<()> {
    for version in XenVersion::ALL {
        println!("{:?}", image::images(version)?);
    }
    Ok(())
}
