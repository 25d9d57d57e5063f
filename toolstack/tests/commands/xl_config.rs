//! `xpci xl-config` on a guest's configuration, as people write them.

use std::fs;
use std::path::Path;

use crate::daemon::{program, xpci};

const FILE: &str = "# a web server
name = \"web\"
type = 'pv'
memory = 512
disk = [ 'phy:/dev/vg/web,xvda,w' ]
pci = [ '01:10.0@5',
        \"01:10.2,permissive=1\", # the other VF
]
";

fn convert(directory: &Path) -> String {
    let file = directory.join("web.cfg");
    fs::write(&file, FILE).unwrap();
    let output = xpci(&directory.join("none"), &["xl-config", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_output_of_xl_config_is_valid_settings() {
    let directory = tempfile::tempdir().unwrap();
    let printed = convert(directory.path());
    let settings = directory.path().join("settings.yaml");
    fs::write(&settings, &printed).unwrap();
    let mut xpcid = program(env!("CARGO_BIN_EXE_xpcid"));
    let checked = xpcid.arg("--check").arg("--settings").arg(&settings).arg("--policies").arg("/nonexistent");
    let checked = checked.output().unwrap();
    assert!(checked.status.success(), "{printed}{}", String::from_utf8_lossy(&checked.stderr));
    assert!(printed.contains("pci-assignable-add --persist 0000:01:10.0 0000:01:10.2"), "{printed}");
    assert!(printed.contains("passthrough=\"enabled\" and e820_host=1"), "{printed}");
    assert!(printed.contains("# permissive has no effect"), "{printed}");
}

#[test]
fn a_missing_file_or_one_without_functions_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let plain = directory.path().join("plain.cfg");
    fs::write(&plain, "name='web'\n").unwrap();
    for (file, code, said) in
        [("none.cfg", 1, "No such file"), ("plain.cfg", 4, "no functions"), (".", 1, "directory")]
    {
        let file = directory.path().join(file);
        let output = xpci(&directory.path().join("none"), &["xl-config", file.to_str().unwrap()]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.contains(said) && text.contains(file.to_str().unwrap()), "{text}");
    }
}
