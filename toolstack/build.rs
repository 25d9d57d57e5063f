//! Gives the programs their version: with the commit when a release is built from a git checkout, plain otherwise. Other profiles have
//! the plain one, so that a commit does not make everything that development builds compile again.

#[path = "build/commit.rs"]
mod commit;

use std::env;
use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build/commit.rs");
    let version = env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let release = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let top = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let found = if release { commit::commit(&Path::new(&top).join("..")) } else { None };
    match found {
        Some(commit::Commit { hash, changes }) => {
            println!("cargo:rerun-if-changed={}", changes.display());
            println!("cargo:rustc-env=XPCI_VERSION={version} ({hash})");
        }
        None => println!("cargo:rustc-env=XPCI_VERSION={version}"),
    }
}
