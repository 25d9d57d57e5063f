//! Policies in the running service: showing, explaining, learning and reloading them.

use std::sync::Arc;

use log::{info, warn};
use pciback::config::{CapabilityAction, Filter, FunctionSpec, Origin, Place, Rule, Segment, Treatment};
use pciback::platform::StoreOps;
use pciback::policy::{
    Explanation, PolicySet, Subject, deferred, explain, learn, mailbox_words, obstacles, rom_unknown,
    selector_word,
};
use pciback::{DomId, Sbdf};

use super::Engine;
use super::functions::CompiledFilter;
use super::guests::MaskedWrites;
use super::problems::Problem;
use super::tasks::TaskContext;
use crate::domains;
use crate::engine;
use crate::names;
use crate::outcome::{ErrorCode, Failure};
use crate::policies::{self, Source};
use crate::protocol::{
    CapabilityRuleView, Cause, DomainName, LearnedView, PolicyFileView, PolicyView, RegisterRuleView,
    ReloadedView, Success,
};
use crate::reply::Reply;
use crate::spec::{Given, existing, guest_spec};
use crate::target::{Parent, Target};

/// Results of background work on policies.
pub enum Event {
    /// New policies were read and checked, and filters compiled from them for the attached functions.
    Compiled(Box<Compiled>),
    /// A reload found mistakes in policy files.
    Mistakes(String),
}

/// The result of a background compilation.
pub struct Compiled {
    /// The policies.
    policies: Arc<PolicySet>,
    /// The policy files, to be copied; `None` where the policies did not change.
    sources: Option<Vec<Source>>,
    /// The new filters, or why one could not be compiled.
    filters: Vec<(Sbdf, Result<CompiledFilter, Failure>)>,
    reply: Option<Reply>,
}

/// An attached function and its guest.
struct User {
    address: Sbdf,
    domain: DomId,
    visible: Vec<u16>,
    given: Given,
}

impl Engine {
    pub(super) fn handle_policies(&mut self, event: Event) {
        match event {
            Event::Compiled(compiled) => self.put_in_force(*compiled),
            Event::Mistakes(problem) => self.not_reloaded(problem),
        }
    }

    fn users(&self, of: impl Fn(&Sbdf) -> bool) -> Vec<User> {
        let in_use = self.functions.filters().filter(|(address, _)| of(address));
        in_use
            .filter_map(|(address, filter)| {
                let domain = self.functions.records().guest(address)?;
                let given = Given { line: filter.spec.has_line(), rom: filter.spec.rom };
                Some(User { address, domain, visible: visible(&filter.filter), given })
            })
            .collect()
    }

    /// Reads the policy files again; nothing changes unless all files are valid.
    pub(super) fn reload_policies(&mut self, reply: Reply) {
        let (context, users) = (self.task_context(), self.users(|_| true));
        let inbox = self.inbox.clone();
        self.background("reload", move || match policies::load(&context.settings.policy_directories) {
            Err(problem) => {
                let text = format!("the earlier policies stay in force: {problem}");
                inbox.send(engine::Event::Policies(Event::Mistakes(text)));
                reply.done(Err(Failure::from(problem).hint("the earlier policies stay in force")));
            }
            Ok((sources, set)) => context.compile(Arc::new(set), Some(sources), users, Some(reply)),
        });
    }

    /// Reports the mistakes that a reload found: what told the service to reload, such as SIGHUP, may not have waited for an answer.
    fn not_reloaded(&mut self, problem: String) {
        warn!("{problem}");
        self.problems.resolve(Cause::Policies);
        self.problems.push(Problem::new(Cause::Policies, problem));
    }

    /// Compiles the filters of some functions again, with the current policies.
    pub(super) fn recompile(&mut self, addresses: Vec<Sbdf>) {
        let (context, policies) = (self.task_context(), Arc::clone(&self.policies));
        let users = self.users(|address| addresses.contains(address));
        self.background("recompile", move || context.compile(policies, None, users, None));
    }

    /// Replaces the filters of attached functions, each between two requests of its guest.
    fn put_in_force(&mut self, compiled: Compiled) {
        let Compiled { policies, sources, filters, reply } = compiled;
        if let Some(sources) = &sources {
            self.policies = Arc::clone(&policies);
            self.holds.begin_anew();
            // They may permit a return that former owners prevented.
            self.return_managed_again();
            self.try_again();
            self.inventory.examine_everything();
            self.problems.resolve(Cause::Policies);
            if let Err(problem) = policies::keep_copy(&self.settings.state_directory, sources) {
                let text = format!("cannot keep a copy of the policies: {problem}");
                warn!("{text}");
                self.problems.push(Problem::new(Cause::Policies, text));
            }
        }
        let views: Vec<ReloadedView> =
            filters.into_iter().filter_map(|(address, filter)| self.swap(address, filter)).collect();
        // Functions that were attached while the files were read have filters of the old policies.
        let late: Vec<Sbdf> = self.outdated(&views);
        if !late.is_empty() {
            self.recompile(late);
        }
        let changed: Vec<_> = views.iter().filter(|view| view.changed).collect();
        for view in &changed {
            self.send_policy_event(view.address, view.registers.clone());
        }
        let changed = changed.len();
        info!("policies: {} files in force, {changed} functions changed", policies.files().len());
        if let Some(reply) = reply {
            reply.done(Ok(Success::Reloaded { files: policies.files().len(), functions: views }));
        }
    }

    fn outdated(&self, but: &[ReloadedView]) -> Vec<Sbdf> {
        let old =
            self.functions.filters().filter(|(_, filter)| !Arc::ptr_eq(&filter.policies, &self.policies));
        let late = old.map(|(address, _)| address);
        late.filter(|address| but.iter().all(|view| view.address != *address)).collect()
    }

    /// Replaces one filter; `None`: the function is no longer attached.
    fn swap(&mut self, address: Sbdf, filter: Result<CompiledFilter, Failure>) -> Option<ReloadedView> {
        let old = Arc::clone(&self.functions.filter(address)?.filter);
        let place = self.functions.records().get(address)?.guest?;
        let mut view = ReloadedView {
            address,
            changed: false,
            registers: Vec::new(),
            deferred: Vec::new(),
            failure: None,
        };
        let swapped = filter.map_err(|failure| failure.to_string()).and_then(|filter| {
            view.registers = differences(&old, &filter.filter);
            view.deferred = filter.filter.deferred().iter().map(deferred).collect();
            let guest = self.guests.get_mut(place.domain).ok_or("its guest has ended")?;
            guest.replace_filter(place.devfn, Arc::clone(&filter.filter))?;
            Ok(filter)
        });
        match swapped {
            Ok(filter) => {
                view.changed = filter.filter.behaviour_hash() != old.behaviour_hash();
                let mailbox = filter.filter.mailbox();
                self.mailboxes
                    .permit(address, mailbox.map_or_else(Default::default, |mailbox| mailbox.peers));
                self.functions.replace_filter(address, filter);
            }
            Err(why) => {
                warn!("{address}: its old filter stays in force: {why}");
                view.registers.clear();
                view.failure = Some(why);
            }
        }
        view.deferred.extend(self.no_reset_later(address, place.domain));
        Some(view)
    }

    /// Why an attached function cannot be reset when its guest releases it, if the policies permit no reset that Linux offers for it.
    fn no_reset_later(&self, address: Sbdf, domain: DomId) -> Option<String> {
        let function = self.platform.host.function(address).ok()?;
        let failure = self.refuse_unresettable(&function, Some(domain)).err()?;
        Some(format!("its guest's release quarantines it: {}", failure.message))
    }

    /// The blocked writes of the guest to a function, or of a guest to all its functions.
    pub(super) fn learned(&self, target: &str, reply: Reply) {
        let found = self.to_learn_from(target);
        let store = Arc::clone(&self.platform.store);
        self.background("learn", move || {
            let learned = found.and_then(|found| {
                found.into_iter().map(|one| one.learned(store.as_ref())).collect::<Result<_, _>>()
            });
            reply.done(learned.map(|functions| Success::Learned { functions }));
        });
    }

    fn to_learn_from(&self, target: &str) -> Result<Vec<Learning>, Failure> {
        let function = match target.parse() {
            Ok(called @ (Target::One(Parent::At(_)) | Target::Vf(..))) => {
                names::find(self.platform.host.as_ref(), &self.settings.names, &called)?.address()
            }
            _ => None,
        };
        let users = match function {
            Some(address) => {
                existing(self.platform.host.as_ref(), address)?;
                let users = self.users(|user| *user == address);
                if users.is_empty() {
                    let text = format!("{address} is not attached: there is nothing to learn from");
                    return Err(Failure::refused(text).on(address));
                }
                users
            }
            None => {
                let domain = domains::find(self.platform.store.as_ref(), &DomainName(target.to_owned()))?;
                let of = |user: &Sbdf| self.functions.records().guest(*user) == Some(domain);
                self.users(of)
            }
        };
        users.iter().map(|user| self.learned_from(user)).collect()
    }

    fn learned_from(&self, user: &User) -> Result<Learning, Failure> {
        let User { address, domain, .. } = *user;
        let missing = || not_learned(address, domain, "it is not served");
        let filter = self.functions.filter(address).ok_or_else(missing)?.clone();
        let place = self.functions.records().place(address).ok_or_else(missing)?;
        let writes = self.guests.get(domain).ok_or_else(missing)?.masked_writes(place.devfn);
        Ok(Learning { address, domain, filter, writes })
    }

    /// Shows the policies that apply to a function.
    pub(super) fn show_policy(&self, address: Sbdf, domain: Option<String>, reply: Reply) {
        self.inspect(address, domain, reply, |inspected| Success::Policy(Box::new(policy_view(&inspected))));
    }

    /// Explains what a guest sees of a function.
    pub(super) fn explain_policy(&self, address: Sbdf, domain: Option<String>, reply: Reply) {
        self.inspect(address, domain, reply, |inspected| {
            let merged = inspected.policies.merge(&inspected.subject);
            let obstacles = obstacles(&inspected.spec, &merged, Some(&inspected.resets));
            let explanation = explain(&inspected.spec, &merged.policy, inspected.visible.as_deref());
            let unknown = rom_unknown(&inspected.spec, &merged).into_iter().collect();
            Success::Explained {
                devices: vec![Explanation { obstacles, unknown, ..explanation }],
                damage: Vec::new(),
            }
        });
    }

    /// Reads and shows a function on a thread, because accesses to config space block during a reset.
    fn inspect(
        &self,
        address: Sbdf,
        domain: Option<String>,
        reply: Reply,
        show: impl FnOnce(Inspected) -> Success + Send + 'static,
    ) {
        let (context, user) = (self.task_context(), self.users(|user| *user == address).pop());
        self.background("explain", move || {
            let host = context.platform.host.as_ref();
            let inspected = existing(host, address).and_then(|function| {
                let given = user.as_ref().map_or(Given { line: true, rom: None }, |user| user.given);
                let spec = guest_spec(host, address, given)?;
                // A guest other than the current one has not seen any capabilities yet.
                let of_user = user.as_ref().filter(|_| domain.is_none());
                let name = match of_user {
                    Some(user) => domains::name(context.platform.store.as_ref(), user.domain)?,
                    None => domain.clone(),
                };
                let visible = of_user.map(|user| user.visible.clone());
                let subject = Subject::of(&spec, name.as_deref());
                let (policies, resets) = (Arc::clone(&context.policies), function.reset_methods);
                Ok(Inspected { policies, spec, subject, visible, resets })
            });
            reply.done(inspected.map(show));
        });
    }
}

/// A function whose blocked writes are learned from.
struct Learning {
    address: Sbdf,
    domain: DomId,
    filter: CompiledFilter,
    writes: MaskedWrites,
}

impl Learning {
    fn learned(self, store: &dyn StoreOps) -> Result<LearnedView, Failure> {
        let Self { address, domain, filter, writes } = self;
        let masked = writes.take().map_err(|why| not_learned(address, domain, &why))?;
        let name = domains::name(store, domain).unwrap_or_default();
        Ok(LearnedView { address, domain, name, learned: learn(&filter.spec, &filter.filter, masked.iter()) })
    }
}

fn not_learned(address: Sbdf, domain: DomId, why: &str) -> Failure {
    Failure::new(ErrorCode::Failed, format!("ask what {address} masked: {why}")).on(address).of(domain)
}

/// A function to be shown or explained.
struct Inspected {
    policies: Arc<PolicySet>,
    spec: FunctionSpec,
    subject: Subject,
    visible: Option<Vec<u16>>,
    /// The reset methods that Linux offers for it.
    resets: Vec<String>,
}

impl TaskContext {
    /// Compiles filters for policies that are not in force yet.
    fn compile(
        mut self,
        policies: Arc<PolicySet>,
        sources: Option<Vec<Source>>,
        users: Vec<User>,
        reply: Option<Reply>,
    ) {
        self.policies = Arc::clone(&policies);
        let filters = users
            .into_iter()
            .map(|user| {
                let spec = guest_spec(self.platform.host.as_ref(), user.address, user.given);
                let filter = spec.and_then(|spec| {
                    let filter = self.compile_filter(&spec, user.domain, Some(&user.visible))?;
                    Ok(CompiledFilter { spec: Arc::new(spec), filter, policies: Arc::clone(&policies) })
                });
                (user.address, filter)
            })
            .collect();
        let compiled = Box::new(Compiled { policies, sources, filters, reply });
        self.inbox.send(engine::Event::Policies(Event::Compiled(compiled)));
    }
}

/// The capabilities that a guest sees.
fn visible(filter: &Filter) -> Vec<u16> {
    let seen = filter.capabilities().iter().filter(|(_, visible)| *visible);
    seen.map(|(capability, _)| capability.offset).collect()
}

/// The registers that two filters of one function treat differently. Adjacent unknown bytes are merged.
fn differences(old: &Filter, new: &Filter) -> Vec<String> {
    let treated = |filter: &Filter, segment: &Segment| {
        let same = filter.segments().iter().filter(|other| other.dword == segment.dword);
        same.filter(|other| other.treatment == segment.treatment).fold(0, |bits, other| bits | other.mask)
    };
    // First and last byte, name, new treatment.
    let mut runs: Vec<(u16, u16, &str, String)> = Vec::new();
    for segment in new.segments().iter().filter(|segment| segment.mask & !treated(old, segment) != 0) {
        let register = segment.register.map(|index| &new.registers()[usize::from(index)]);
        let (offset, width, name) = register.map_or((segment.dword, 4, "unknown"), |register| {
            (register.offset, u16::from(register.width), register.name)
        });
        // The value is in the policy; with it, a register would be listed once per field.
        let treatment = match segment.treatment {
            Treatment::Fixed(_) => "fixed".to_owned(),
            other => other.to_string(),
        };
        match runs.last_mut() {
            Some((first, last, known, how))
                if *known == name && *how == treatment && (*first == offset || *last + 1 == offset) =>
            {
                *last = (*last).max(offset + width - 1);
            }
            _ => runs.push((offset, offset + width - 1, name, treatment)),
        }
    }
    let text =
        |(first, last, name, how): &(u16, u16, &str, String)| format!("{first:03x}-{last:03x} {name}: {how}");
    runs.iter().map(text).collect()
}

fn origin(rule: &Rule) -> String {
    let prefix = if matches!(rule.origin, Origin::BuiltIn { .. }) { "built in, " } else { "" };
    format!("{prefix}{}", rule.origin)
}

fn policy_view(inspected: &Inspected) -> PolicyView {
    let Inspected { policies, spec, subject, visible, .. } = inspected;
    let merged = policies.merge(subject);
    let file = |file: &pciback::policy::PolicyFile, mismatch: Option<String>| PolicyFileView {
        name: file.name.clone(),
        description: file.description.clone(),
        matches: file.matching.to_string(),
        mismatch,
    };
    let passed_over = merged.passed_over.iter().map(|(passed, reason)| file(passed, Some(reason.clone())));
    let files = passed_over.chain(merged.applied.iter().map(|applied| file(applied, None))).collect();
    let (treatment, rule) = &merged.policy.unknown;
    let capabilities = merged.policy.capabilities.iter().map(|entry| CapabilityRuleView {
        capability: selector_word(&entry.which),
        action: match entry.action {
            CapabilityAction::Show => "show".to_owned(),
            CapabilityAction::Hide => "hide".to_owned(),
            CapabilityAction::Treat(treatment) => treatment.to_string(),
        },
        reason: entry.rule.reason.clone().into_owned(),
        origin: origin(&entry.rule),
    });
    let registers = merged.policy.registers.iter().map(|entry| RegisterRuleView {
        place: match entry.place {
            Place::Absolute(offset) => format!("{offset:#x}"),
            Place::In(which, offset) => format!("{}+{offset:#x}", selector_word(&which)),
        },
        width: entry.width,
        mask: entry.mask,
        treatment: entry.treatment.to_string(),
        reason: entry.rule.reason.clone().into_owned(),
        origin: origin(&entry.rule),
    });
    let explanation = explain(spec, &merged.policy, visible.as_deref());
    let notes = explanation.not_assignable.into_iter().chain(explanation.refused).chain(explanation.deferred);
    PolicyView {
        address: spec.address,
        id: format!("{:04x}:{:04x}", spec.identity.vendor, spec.identity.device),
        domain: subject.domain.clone(),
        files,
        errors: merged.errors.to_string(),
        permits: merged.permits.iter().map(|permission| permission.word().to_owned()).collect(),
        rdm_policy: merged.rdm.word().to_owned(),
        rom: merged.rom.0.to_string(),
        vfs_by_guest: merged.policy.virtual_functions.as_ref().map(|by_guest| by_guest.count),
        mailbox: merged.policy.mailbox.as_ref().map(|wish| mailbox_words(wish.peers)),
        reset_methods: merged.reset.methods.clone(),
        reset_together: merged.reset.wants_together(),
        without_reset: merged.reset.permits_none(),
        profile: merged.profile.0.word().to_owned(),
        unknown: format!("{treatment} ({}; {})", rule.reason, origin(rule)),
        capabilities: capabilities.collect(),
        registers: registers.collect(),
        notes: notes.collect(),
    }
}
