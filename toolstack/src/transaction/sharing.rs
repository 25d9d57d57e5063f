//! Resources that a function shares with functions of other owners: a page of memory with registers of both, an interrupt line, or IOMMU
//! translation.
//!
//! A shared page or IOMMU group lets one owner reach what belongs to the other, so that the function is refused unless a policy permits
//! it by name. A shared interrupt line is not granted: a function that supports MSI or MSI-X works without it, and any other function is
//! refused.

use nix::errno::Errno;
use pciback::config::{AnyId, FunctionSpec};
use pciback::containment::radius::{Bridge, Radius, Sharer, has_bar_in_pages_of, is_alone};
use pciback::live::{self, Changed, Switch};
use pciback::platform::{HostFunction, Platform, Resource};
use pciback::policy::{Permission, PolicySet, Subject};
use pciback::spec::{CapabilityId, header};
use pciback::{DomId, Sbdf};

use super::grants::{bar_grant, refuse_foreign};
use super::hold::{guest_owned, is_owned_by_other_toolstack};
use super::path::{FunctionPath, Member};
use super::reset::config_failure;
use super::together::{self, Buses, Fresh};
use super::{Context, guest_of, rom};
use crate::domains;
use crate::journal::{Grant, Granted, Journal, Owner, Record};
use crate::outcome::{Failure, few};
use crate::spec::SpecExt;

/// The number of other functions that a message names.
const SHOWN: usize = 3;

/// The inputs of the checks.
pub struct Sharing<'a> {
    /// The host.
    pub platform: &'a Platform,
    /// The policies in force.
    pub policies: &'a PolicySet,
    /// The journal, with the owners of functions.
    pub journal: &'a Journal,
    /// The functions that were reset with their bus and have had no owner since.
    pub fresh: &'a Fresh,
}

/// What a guest gets of its function's interrupt line.
pub(super) enum Line {
    /// The guest gets the line, or the function has none.
    Given(Option<u32>),
    /// The guest does not get the line, because another owner uses it; with a warning.
    Withheld(String),
}

impl<'a> Context<'a> {
    fn sharing(&self) -> Sharing<'a> {
        Sharing { platform: self.platform, policies: self.policies, journal: self.journal, fresh: self.fresh }
    }
}

/// Refuses to attach a function because of what it shares.
pub(super) fn refuse(context: &Context<'_>, record: &Record, path: &FunctionPath) -> Result<(), Failure> {
    let domain = guest_of(record)?;
    let function = context.platform.host.function(record.address)?;
    let rom = rom::own(context.platform, context.policies, &function, Some(domain))?;
    let found = context.sharing().on_path(path, Some(domain), rom)?;
    Failure::refuse_for(&format!("attach {} to domain {domain}", record.address), found)
}

/// Refuses to give a function back to dom0 that another toolstack has attached, or that shares something with a guest's.
pub fn refuse_release(sharing: &Sharing<'_>, record: &Record) -> Result<(), Failure> {
    let address = record.address;
    let function = match sharing.platform.host.function(address) {
        Err(error) if error.errno() == Some(Errno::ENOENT) => return Ok(()),
        other => other?,
    };
    if is_owned_by_other_toolstack(sharing.platform, record)? {
        return Err(guest_owned(sharing.platform, address));
    }
    let buses = Buses { platform: sharing.platform, journal: sharing.journal, fresh: sharing.fresh };
    together::refuse_release(&buses, sharing.policies, record)?;
    // Without any attached function there is nothing to share with a guest.
    if !sharing.journal.owners().values().any(|owner| matches!(owner, Owner::Domain(_))) {
        return Ok(());
    }
    let found = sharing.obstacles(function.address, Some(DomId::DOM0))?;
    Failure::refuse_for(&format!("give {address} back to dom0"), found)
}

/// A function of another owner.
struct Foreign {
    function: HostFunction,
    owner: Owner,
}

impl Foreign {
    fn described(&self) -> String {
        let address = self.function.address;
        match (self.owner, self.function.driver.as_deref()) {
            (Owner::Domain(DomId::DOM0), None) => format!("{address} (dom0's, without a driver)"),
            (Owner::Domain(DomId::DOM0), Some(driver)) => format!("{address} (dom0's, with {driver})"),
            (Owner::Domain(domain), _) => format!("{address} (domain {domain}'s)"),
            (Owner::Held | Owner::Quarantined, _) => format!("{address} (quarantined)"),
        }
    }
}

impl Sharing<'_> {
    /// Obstacles to giving a function to a domain, or to any domain.
    pub fn obstacles(&self, address: Sbdf, domain: Option<DomId>) -> Result<Vec<Failure>, Failure> {
        let host = self.platform.host.as_ref();
        let function = host.function(address)?;
        // One that no guest can be given is reported by the check of ROMs.
        let rom = rom::own(self.platform, self.policies, &function, domain).unwrap_or(None);
        let mut found = self.on_path(&FunctionPath::of(self.platform, address)?, domain, rom)?;
        // Only checked for a held function: before that, its BARs contain the claims of dom0's driver.
        if domain != Some(DomId::DOM0) && self.journal.owners().get(&address) == Some(&Owner::Held) {
            found.extend(refuse_foreign(host, &function, rom).err());
        }
        Ok(found)
    }

    /// With the expansion ROM that the domain is given, if any.
    fn on_path(
        &self,
        path: &FunctionPath,
        domain: Option<DomId>,
        rom: Option<Resource>,
    ) -> Result<Vec<Failure>, Failure> {
        let Some(Member { function, bytes, .. }) = path.members.last() else { return Ok(Vec::new()) };
        let bridges = path.bridges();
        // BARs of a VF are page aligned (PCI Express 6.0, section 9.3.3.13), and it has no interrupt line.
        if is_alone(function, &bridges) {
            return Ok(Vec::new());
        }
        let foreign = self.foreign(function.address, domain)?;
        let spec = crate::spec::function_spec(self.platform.host.as_ref(), function.address)?;
        let messages = spec.has_messages();
        let has_pin = bytes.get(usize::from(header::INTERRUPT_PIN)).is_some_and(|pin| *pin != 0);
        let mut found = self.shared(function, &bridges, &foreign, domain, rom)?;
        if has_pin && (!messages || domain == Some(DomId::DOM0)) {
            let granted = self.journal.granted().clone();
            let users = self.line_users(function, domain, &granted, &foreign);
            found.extend(self.refused_line(function, domain, &users)?);
        }
        Ok(found)
    }

    /// Functions of other owners, and quarantined ones, whose owner is not certain.
    fn foreign(&self, address: Sbdf, domain: Option<DomId>) -> Result<Vec<Foreign>, Failure> {
        let host = self.platform.host.as_ref();
        let owners = self.journal.owners().clone();
        let mut foreign = Vec::new();
        for other in host.functions()? {
            let owner = owners.get(&other).copied().unwrap_or(Owner::Domain(DomId::DOM0));
            let is_foreign = match owner {
                Owner::Held => false,
                Owner::Quarantined => domain != Some(DomId::DOM0),
                Owner::Domain(owner) => domain != Some(owner),
            };
            // A function that leaves meanwhile shares nothing.
            if other != address
                && is_foreign
                && let Ok(function) = host.function(other)
            {
                foreign.push(Foreign { function, owner });
            }
        }
        Ok(foreign)
    }

    fn shared(
        &self,
        function: &HostFunction,
        bridges: &[Bridge],
        foreign: &[Foreign],
        domain: Option<DomId>,
        rom: Option<Resource>,
    ) -> Result<Vec<Failure>, Failure> {
        let address = function.address;
        let others: Vec<HostFunction> = foreign.iter().map(|foreign| foreign.function.clone()).collect();
        let radius = Radius::of(function, false, bridges, &others);
        let mut found = Vec::new();
        let page = Permission::SharedPage;
        let granted = self.journal.granted().clone();
        let own: Vec<Grant> = function.bars().iter().chain(&rom).filter_map(bar_grant).collect();
        // The expansion ROM of a function counts where a guest has it.
        let is_in_pages = |other: &&Foreign| {
            let address = other.function.address;
            radius.page.iter().any(|sharer| sharer.address == address)
                || rom.is_some_and(|rom| has_bar_in_pages_of(&other.function, &rom))
                || granted.get(&address).is_some_and(|(_, theirs)| have_common_page(&own, theirs))
        };
        let in_pages: Vec<&Foreign> = foreign.iter().filter(is_in_pages).collect();
        if let Some(who) = self.refused(function, domain, page, &in_pages)? {
            found.push(shared_page(address, domain, &who));
        }
        let group = Permission::SharedGroup;
        if let Some(who) = self.refused(function, domain, group, &of(foreign, &radius.iommu_group))? {
            let because = &radius.iommu_group_because;
            let text = format!("the IOMMU cannot isolate {address} from {who}: {because}");
            let hint = hint(group, "give them to one owner, or hold them with 'xpci pci-assignable-add'");
            found.push(Failure { domain, ..Failure::refused(text).on(address).hint(hint) });
        }
        Ok(found)
    }

    /// The functions with which sharing is not permitted, as text; `None` if there are none.
    fn refused(
        &self,
        function: &HostFunction,
        domain: Option<DomId>,
        permission: Permission,
        sharers: &[&Foreign],
    ) -> Result<Option<String>, Failure> {
        if sharers.is_empty() || self.permits(function, domain, permission)? {
            return Ok(None);
        }
        let mut refused = Vec::new();
        for sharer in sharers {
            // If a policy permits a guest to share with dom0, dom0 may also share with that guest when it gets the other function back.
            let permitted = match sharer.owner {
                Owner::Domain(guest) if domain == Some(DomId::DOM0) => {
                    self.permits(&sharer.function, Some(guest), permission)?
                }
                _ => false,
            };
            if !permitted {
                refused.push(sharer.described());
            }
        }
        Ok((!refused.is_empty()).then(|| few(&refused, SHOWN)))
    }

    fn permits(
        &self,
        function: &HostFunction,
        domain: Option<DomId>,
        permission: Permission,
    ) -> Result<bool, Failure> {
        let store = self.platform.store.as_ref();
        let guest = domain.filter(|domain| *domain != DomId::DOM0);
        let name = guest.map_or(Ok(None), |guest| domains::name(store, guest))?;
        Ok(self.policies.merge(&Subject::of_host(function, name)).permits.contains(&permission))
    }

    /// Functions of other owners that use the interrupt line of a function.
    fn line_users<'f>(
        &self,
        function: &HostFunction,
        domain: Option<DomId>,
        granted: &Granted,
        foreign: &'f [Foreign],
    ) -> Vec<&'f Foreign> {
        let uses = |other: &&Foreign| match other.owner {
            Owner::Domain(DomId::DOM0) => {
                other.function.irq == function.irq
                    && other.function.driver.is_some()
                    && self.may_assert_line(other.function.address)
            }
            _ => granted.get(&other.function.address).is_some_and(|(guest, grants)| {
                domain != Some(*guest) && grants.contains(&Grant::Gsi { gsi: function.irq })
            }),
        };
        if function.irq == 0 { Vec::new() } else { foreign.iter().filter(uses).collect() }
    }

    /// Whether a function that dom0's driver uses may assert INTx: it has an interrupt pin, INTx is not disabled, and MSI and MSI-X are
    /// off. A function that does not answer counts as one that may.
    fn may_assert_line(&self, address: Sbdf) -> bool {
        let config = match self.platform.host.config(address) {
            Ok(config) => config,
            Err(error) => return error.errno() != Some(Errno::ENOENT),
        };
        config.read_all().map_or(true, |bytes| live::may_send_intx(&bytes))
    }

    fn refused_line(
        &self,
        function: &HostFunction,
        domain: Option<DomId>,
        users: &[&Foreign],
    ) -> Result<Option<Failure>, Failure> {
        let line = Permission::SharedLine;
        let Some(who) = self.refused(function, domain, line, users)? else { return Ok(None) };
        let address = function.address;
        let text = format!(
            "{address} uses interrupt line {}, which {who} uses too: each of them can keep the line asserted",
            function.irq
        );
        let hint = hint(line, "put the card into another slot");
        Ok(Some(Failure { domain, ..Failure::refused(text).on(address).hint(hint) }))
    }

    /// Disables INTx of a function whose guest does not get the line. Refuses hardware that does not implement Interrupt Disable, because
    /// it could keep the line asserted, and only the other users of the line would see that.
    fn silence(&self, address: Sbdf, refusal: Failure) -> Result<(), Failure> {
        let config = self.platform.host.config(address)?;
        match live::set_intx(config.as_ref(), Switch::Off) {
            Ok(Changed::Kept) => Ok(()),
            Ok(Changed::Differs { .. } | Changed::Silent) => Err(refusal),
            Err(error) => Err(config_failure("switch off INTx of", address, &error)),
        }
    }
}

/// Facts about a function's interrupt line that are determined before the grants are locked.
pub(super) struct LineCheck<'a> {
    function: &'a HostFunction,
    domain: DomId,
    has_line: bool,
    /// Whether the guest sees MSI or MSI-X.
    messages: bool,
    foreign: Vec<Foreign>,
}

impl<'a> LineCheck<'a> {
    /// Examines all functions that may use the line.
    pub fn of(
        context: &Context<'_>,
        function: &'a HostFunction,
        spec: &FunctionSpec,
        domain: DomId,
    ) -> Result<Self, Failure> {
        let has_line = spec.has_interrupt_pin() && spec.has_line();
        let foreign = match has_line {
            true => context.sharing().foreign(function.address, Some(domain))?,
            false => Vec::new(),
        };
        let messages = has_line && sends_messages(context, spec, domain)?;
        Ok(Self { function, domain, has_line, messages, foreign })
    }

    /// Decides about the line while `granted` is locked.
    pub fn settle(&self, context: &Context<'_>, granted: &Granted) -> Result<Line, Failure> {
        let Self { function, domain, .. } = self;
        let (address, gsi) = (function.address, function.irq);
        if !self.has_line {
            return Ok(Line::Given(None));
        }
        let sharing = context.sharing();
        let users = sharing.line_users(function, Some(*domain), granted, &self.foreign);
        let Some(refusal) = sharing.refused_line(function, Some(*domain), &users)? else {
            return Ok(Line::Given(Some(gsi)));
        };
        if !self.messages {
            return Err(refusal);
        }
        sharing.silence(address, refusal)?;
        let users: Vec<String> = users.iter().map(|user| user.described()).collect();
        Ok(Line::Withheld(format!(
            "domain {domain} gets {address} without its interrupt line {gsi}, which {} uses too: its driver must use MSI or MSI-X (a \
             policy with 'permit: [shared-line]' gives the line as well)",
            few(&users, SHOWN)
        )))
    }
}

/// Refuses pages that were granted to another guest, while `granted` is locked.
pub(super) fn refuse_pages(
    context: &Context<'_>,
    function: &HostFunction,
    domain: DomId,
    grants: &[Grant],
    granted: &Granted,
) -> Result<(), Failure> {
    let others = granted.iter().filter(|(_, (guest, _))| *guest != domain);
    let Some((other, (guest, _))) =
        others.into_iter().find(|(_, (_, theirs))| have_common_page(grants, theirs))
    else {
        return Ok(());
    };
    let page = Permission::SharedPage;
    if context.sharing().permits(function, Some(domain), page)? {
        return Ok(());
    }
    let who = format!("{other} (domain {guest}'s)");
    Err(shared_page(function.address, Some(domain), &who))
}

/// Whether the guest sees MSI or MSI-X.
fn sends_messages(context: &Context<'_>, spec: &FunctionSpec, domain: DomId) -> Result<bool, Failure> {
    let filter = context.serving.filter(spec, domain)?;
    let messages = [AnyId::Legacy(CapabilityId::MSI), AnyId::Legacy(CapabilityId::MSI_X)];
    Ok(filter.capabilities().iter().any(|(capability, seen)| *seen && messages.contains(&capability.id)))
}

fn have_common_page(grants: &[Grant], others: &[Grant]) -> bool {
    grants.iter().any(|one| others.iter().any(|other| meet(*one, *other)))
}

/// Whether two grants have a page in common.
fn meet(one: Grant, other: Grant) -> bool {
    match (one, other) {
        (Grant::Iomem { first, frames }, Grant::Iomem { first: from, frames: length }) => {
            first < from.saturating_add(length) && from < first.saturating_add(frames)
        }
        _ => false,
    }
}

fn shared_page(address: Sbdf, domain: Option<DomId>, who: &str) -> Failure {
    let text = format!(
        "a page of memory with a BAR of {address} also holds registers of {who}: whoever maps it reaches both"
    );
    let hint = hint(
        Permission::SharedPage,
        "give them to one owner, or have Linux place them on pages of their own (its parameter pci=resource_alignment)",
    );
    Failure { domain, ..Failure::refused(text).on(address).hint(hint) }
}

/// The functions that the radius names.
fn of<'f>(foreign: &'f [Foreign], sharers: &[Sharer]) -> Vec<&'f Foreign> {
    let named = |foreign: &&Foreign| sharers.iter().any(|sharer| sharer.address == foreign.function.address);
    foreign.iter().filter(named).collect()
}

fn hint(permission: Permission, otherwise: &str) -> String {
    let word = permission.word();
    format!(
        "{otherwise}; to permit that, write 'permit: [{word}]' in a policy that matches the function; then 'xpci policy reload'"
    )
}
