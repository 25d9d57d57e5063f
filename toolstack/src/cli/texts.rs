//! Longer texts of the help, the manual pages and `docs/commands.md`. Lines that begin with two spaces are not wrapped.

pub(super) const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 service not reachable, \
                                     4 no such function or domain, 5 refused because of the present state, 6 failed and quarantined.";

pub(super) const GENERAL: &str = "\
Exit codes, and 'error.code' with --json:

  0  done, or nothing had to be done
  1  failed; all changes were undone (failed)
  2  wrong usage (usage)
  3  the service cannot be reached (unreachable)
  4  there is no such function or domain (not-found)
  5  refused because of the present state; nothing was changed (refused)
  6  failed, and could not be undone: the function is quarantined (quarantined)

Commands are idempotent: attaching a function again to the guest that has it, detaching one that no guest has, and enabling as many VFs as a \
PF has exit with 0 and say so. A command for several functions exits with the highest code.

A refusal names everything that prevents the command. With --dry-run, pci-attach and pci-assignable-add make the same checks, change \
nothing, and exit as the command would: 0 if nothing prevents it, otherwise 5. What only Xen knows, for example whether the guest was created \
with passthrough, is not checked.

With --json each answer is one JSON object with 'version', 'id', 'command' (as typed: 'vf-create') and 'ok', and either 'result' or 'error': \
'code', 'message', 'hint', 'address', 'domain', and 'obstacles', each with 'message' and 'hint', where there is more than one. Keys of several words have \
hyphens. A command for several functions prints one object with 'answers', one for each function, and 'ok' if all succeeded; \
pci-attach, which attaches all or none, has one answer. Wrong usage \
is answered in the same form. Only 'events --follow' prints one object a line.";

pub(super) const LIST: &str = "\
Names come from udev's hardware database; ids are in brackets. Functions with the same number in the column GROUP cannot be isolated \
from each other by the IOMMU: Xen shows dom0 no IOMMU groups, so xpci derives them from the ports above, as Linux does. On a narrow terminal \
columns are left out; output to anything but a terminal is never shortened, unless COLUMNS is set.";

pub(super) const ATTACH: &str = "\
The function is given as in xl.cfg: '01:10.0@5' or '01:10.0,vslot=5'. Of xl's options, permissive, msitranslate and power_mgmt have no \
effect, and the command says what replaces them; seize=1 and rdm_policy=strict are refused, with the command or policy key to use \
instead; name=NAME is a name of the settings.

A function is refused while a PV guest that had it still exists, because that guest may have its BARs mapped, which Xen cannot revoke. Shut \
that guest down, or use --trust-former-owner. The same applies to pci-assignable-remove and 'quarantine clear'.";

pub(super) const SAVE: &str = "\
The guest's drivers release its functions; if one does not in time, nothing is saved, and the guest gets back what it had. Then the guest is \
saved by 'xl save'; if that fails, the guest runs on and gets its functions again, at the same places. FILE.xpci belongs to the checkpoint: \
move it with FILE to another host. On this host the functions stay reserved for the guest; 'pci-detach --persistent' ends that.

HVM guests that have functions are refused.";

pub(super) const RESTORE: &str = "\
A function is given to the guest if it has the ids, BARs and capabilities of the one that it had, is held or can be held, and is reserved for \
no other guest: the same one if possible, otherwise an equal one. It has the device number and the network settings that the guest knows. If \
there is none, or another guest has it, the command is refused before 'xl restore' begins, and says what differs.

If the functions cannot be attached to the restored guest, that guest is ended before it runs. FILE stays as it is.";

pub(super) const MIGRATE: &str = "\
The guest does not run while its memory is sent: PV guests cannot move live. First the other host reserves a function for each that the \
guest has, by the rules of 'restore', or refuses and says what differs; the guest runs on meanwhile. Then the guest's drivers release its functions, \
'xl save' sends the guest, 'xl restore' restores it there, paused, and its functions are attached. When all that is done, the guest is handed over: it \
is ended here and runs there.

If anything fails before, the guest runs on here and has its functions again. If the connection ends after that, the guest stays paused there, \
and 'xpci status' on both hosts says what to do. The guest never runs on both.

The disks of the guest must be reachable on both hosts under the same names, and both need the same version of xpci.";

pub(super) const STATUS: &str = "\
The states of a function:

  host         it belongs to dom0
  held         it is held for guests; no guest has it
  attaching    it is being given to a guest
  attached     a guest has it
  detaching    it is being taken from a guest
  resetting    it is being reset
  gone         it has left the host
  quarantined  no guest gets it until 'quarantine clear'; bus mastering and interrupts are off

A function is quarantined when a reset, an unbind, a revocation or the undoing of a failed command fails, and by error policies.

A problem has 'message', 'since' (absent if it is as old as the boot of the host), the 'address' and 'domain' that it is about, and 'cause', \
one of: quarantine, holding, persistent, starts, network, virtual-functions, out-of-step, error-reporting, guest, settings, policies, \
audit-log, state-files, service. It disappears when it is resolved: a later operation on the function succeeds, the guest ends or connects \
again, the policies are reloaded, the unusable file is removed. 'errors' of a guest counts the requests that were answered with an error, except \
reads of functions that do not exist, which every bus scan makes.";
