//! `aer status` and `blast-radius`. They run on threads, because accesses to config space and sysfs block while a function is being
//! reset.

use pciback::Sbdf;
use pciback::containment::Setting;

use crate::engine::Engine;
use crate::engine::tasks::TaskContext;
use crate::outcome::Failure;
use crate::protocol::{AerOwner, AerStatusView, MemberView, PathRegisterView, PathView, Success};
use crate::reply::Reply;
use crate::spec::existing;
use crate::transaction::{FunctionPath, Member, before_on_path, blast_radius, value_in};

impl Engine {
    /// The registers on the path of one function, or of all functions with a record.
    pub(super) fn aer_status(&self, address: Option<Sbdf>, reply: Reply) {
        let wanted = match address {
            Some(address) => existing(self.platform.host.as_ref(), address).map(|_| vec![address]),
            None => Ok(self.functions.records().all().map(|record| record.address).collect()),
        };
        let addresses = match wanted {
            Ok(addresses) => addresses,
            Err(failure) => return reply.done(Err(failure)),
        };
        let context = self.task_context();
        self.background("aer status", move || {
            let view = |found: &Sbdf| match path_view(&context, *found) {
                // In the list of all, a function that has left the host is skipped.
                Err(_) if address.is_none() => None,
                other => Some(other),
            };
            let functions = addresses.iter().filter_map(view).collect::<Result<Vec<_>, Failure>>();
            reply.done(functions.map(|functions| Success::AerStatus(AerStatusView { functions })));
        });
    }

    /// Which functions and guests a failure of this function affects.
    pub(super) fn blast_radius(&self, address: Sbdf, reply: Reply) {
        if let Err(failure) = existing(self.platform.host.as_ref(), address) {
            return reply.done(Err(failure));
        }
        let context = self.task_context();
        self.background("blast radius", move || {
            let path = FunctionPath::of(&context.platform, address);
            let radius = path.and_then(|path| blast_radius(&context.platform, &path));
            reply.done(radius.map(|radius| Success::BlastRadius(Box::new(radius))));
        });
    }
}

fn path_view(context: &TaskContext, address: Sbdf) -> Result<PathView, Failure> {
    let path = FunctionPath::of(&context.platform, address)?;
    let aer_owner = match path.root_port {
        Some((_, true)) => AerOwner::Linux,
        Some((_, false)) => AerOwner::Platform,
        None => AerOwner::NoRootPort,
    };
    let members = path.members.iter().map(|member| member_view(context, member, path.os_owns_aer()));
    Ok(PathView { address, aer_owner, members: members.collect::<Result<_, _>>()? })
}

fn member_view(context: &TaskContext, member: &Member, os_owns_aer: bool) -> Result<MemberView, Failure> {
    let address = member.function.address;
    let entry = context.files.ledger.entry(address)?;
    let users = entry.map(|entry| entry.users.into_iter().collect()).unwrap_or_default();
    let register = |setting: &Setting| {
        let value = value_in(&member.bytes, setting.access);
        PathRegisterView {
            name: setting.row.name.to_owned(),
            offset: setting.access.offset(),
            width: setting.row.width,
            value,
            mask: setting.row.mask,
            wanted: setting.row.wanted,
            before: before_on_path(&context.files.ledger, address, setting),
            as_wanted: setting.unlike(value) == 0,
            reason: format!("{} ({})", setting.row.reason, setting.row.section),
        }
    };
    Ok(MemberView {
        address,
        role: member.role,
        users,
        counters: context.platform.errors.counters(address)?.map(Into::into),
        registers: member.settings(os_owns_aer).iter().map(register).collect(),
    })
}
