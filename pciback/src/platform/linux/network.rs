//! The network settings of VFs through rtnetlink, on the PF's interface.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, socket,
};

use super::attributes::{names, parse_decimal, read_text};
use super::vf_messages::{acknowledged, read_request, set_request, vfs};
use crate::Sbdf;
use crate::platform::network::PfNetwork;
use crate::platform::{Cause, PlatformError, Result, VfNetwork, VfPlace, VfSetting};

/// How long the kernel may take: it waits for its network lock, which a driver that resets its device may hold for seconds.
const LIMIT: Duration = Duration::from_secs(15);
/// An attribute, and so a list of VFs, is at most 64 KiB long; the rest of a link takes a few.
const LONGEST_ANSWER: usize = 256 * 1024;

/// VFs' network settings on this host.
pub struct LinuxVfNetwork {
    root: PathBuf,
}

struct Interface {
    name: String,
    index: u32,
}

impl LinuxVfNetwork {
    /// The functions below this sysfs, usually `/sys`; their interfaces are those of this process's network namespace.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// A PF's interfaces, the oldest first.
    fn interfaces(&self, physical_function: Sbdf) -> std::result::Result<Vec<Interface>, Cause> {
        let directory = self.root.join(format!("bus/pci/devices/{physical_function}/net"));
        let mut found = Vec::new();
        for name in names(&directory)?.unwrap_or_default() {
            // One that disappears in between is not listed.
            if let Some(text) = read_text(&directory.join(&name).join("ifindex"))? {
                found.push(Interface { name, index: parse_decimal(&text)? });
            }
        }
        found.sort_by_key(|interface| interface.index);
        Ok(found)
    }

    /// The interface through which the VFs are set. A PF in switchdev mode has one for each VF besides, which reports no VFs.
    fn find(&self, physical_function: Sbdf) -> std::result::Result<Option<(Interface, PfNetwork)>, Cause> {
        let mut first = None;
        for interface in self.interfaces(physical_function)? {
            let answer = ask(read_request(interface.index))?;
            let found = PfNetwork { interface: interface.name.clone(), vfs: vfs(&answer)? };
            if !found.vfs.is_empty() {
                return Ok(Some((interface, found)));
            }
            first = first.or(Some((interface, found)));
        }
        Ok(first)
    }
}

impl VfNetwork for LinuxVfNetwork {
    fn vf_settings(&self, physical_function: Sbdf) -> Result<Option<PfNetwork>> {
        let found = self.find(physical_function).map_err(|cause| {
            PlatformError::new("read the network settings of the VFs of", physical_function, cause)
        })?;
        Ok(found.map(|(_, network)| network))
    }

    fn set_vf_setting(&self, vf: VfPlace, setting: VfSetting) -> Result<()> {
        let set = || {
            let (interface, _) = self.find(vf.physical_function)?.ok_or(Errno::ENODEV)?;
            acknowledged(&ask(set_request(interface.index, vf.index, setting))?)
        };
        set().map_err(|cause| PlatformError::new(setting.action(), vf, cause))
    }
}

/// Sends one request and returns the answer. The kernel works while the request is sent and cannot be interrupted: a thread of
/// its own does it, and is left alone when the time is over.
fn ask(request: Vec<u8>) -> std::result::Result<Vec<u8>, Cause> {
    let (sender, receiver) = mpsc::channel();
    let exchange = move || {
        // The caller may have given up.
        let _ = sender.send(exchange(&request));
    };
    thread::Builder::new().name("netlink".into()).spawn(exchange).map_err(Cause::from)?;
    receiver.recv_timeout(LIMIT).map_err(|_| Cause::TimedOut(LIMIT))?
}

fn exchange(request: &[u8]) -> std::result::Result<Vec<u8>, Cause> {
    let socket: OwnedFd =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    send(socket.as_raw_fd(), request, MsgFlags::empty())?;
    let mut answer = vec![0; LONGEST_ANSWER];
    // The kernel answers within `send`: what is not there now never comes.
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC)?;
    if length > answer.len() {
        return Err(Errno::EMSGSIZE.into());
    }
    answer.truncate(length);
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const PF: Sbdf = Sbdf::from_devfn(0, 1, 0);

    /// A sysfs in which the PF has this machine's own loopback interface.
    fn sysfs(index: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let interface = directory.path().join(format!("bus/pci/devices/{PF}/net/lo"));
        fs::create_dir_all(&interface).unwrap();
        fs::write(interface.join("ifindex"), format!("{index}\n")).unwrap();
        directory
    }

    #[test]
    fn a_pf_without_an_interface_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        assert!(LinuxVfNetwork::new(directory.path().into()).vf_settings(PF).unwrap().is_none());
    }

    #[test]
    fn this_kernel_answers_for_an_interface_without_vfs() {
        let directory = sysfs("1");
        let network = LinuxVfNetwork::new(directory.path().into()).vf_settings(PF).unwrap().unwrap();
        assert_eq!((network.interface.as_str(), network.vfs.len()), ("lo", 0));
    }

    #[test]
    fn this_kernel_s_refusals_come_back_with_what_was_attempted() {
        let directory = sysfs("1");
        let network = LinuxVfNetwork::new(directory.path().into());
        let vf = VfPlace { address: Sbdf::from_devfn(0, 1, 0x80), physical_function: PF, index: 0 };
        let error = network.set_vf_setting(vf, VfSetting::SpoofCheck(true)).unwrap_err();
        // EPERM where the tests do not run as root.
        assert!(matches!(error.errno(), Some(Errno::EOPNOTSUPP | Errno::EPERM)), "{error}");
        let said = error.to_string();
        assert!(
            said.starts_with("cannot set the spoof check of 0000:01:10.0 (VF 0 of 0000:01:00.0)"),
            "{said}"
        );
    }

    #[test]
    fn an_interface_that_has_just_left_is_an_error_with_its_number() {
        let directory = sysfs("2147483000");
        let error = LinuxVfNetwork::new(directory.path().into()).vf_settings(PF).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::ENODEV), "{error}");
    }
}
