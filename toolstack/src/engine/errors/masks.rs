//! Correctable errors that are masked for some time, because a function reports too many.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use log::warn;
use pciback::Sbdf;
use pciback::live::errors::{self as registers, Masked};
use pciback::platform::Host;

use super::{Context, Effect, Errors, Event};
use crate::engine;
use crate::engine::problems::Problem;
use crate::protocol::Cause;

/// Masked correctable errors of one function.
struct Mask {
    /// What was masked; `None` while a thread does it, or where it failed.
    masked: Option<Masked>,
    /// When they are unmasked.
    until: Instant,
}

/// The functions whose correctable errors are masked.
#[derive(Default)]
pub(super) struct Masks(BTreeMap<Sbdf, Mask>);

impl Masks {
    pub fn contains(&self, address: Sbdf) -> bool {
        self.0.contains_key(&address)
    }

    fn begin(&mut self, address: Sbdf, until: Instant) {
        self.0.insert(address, Mask { masked: None, until });
    }

    /// Notes what was masked. Returns it if it is to be unmasked in hardware, because the guest lost the function meanwhile.
    fn masked(&mut self, address: Sbdf, masked: Masked) -> Option<Masked> {
        match self.0.get_mut(&address) {
            Some(mask) => {
                mask.masked = Some(masked);
                None
            }
            None => self.hand_over(masked),
        }
    }

    /// Removes the mask of a function. Returns what is to be unmasked in hardware.
    fn remove(&mut self, address: Sbdf) -> Option<Masked> {
        let masked = self.0.remove(&address)?.masked?;
        self.hand_over(masked)
    }

    /// The same registers may still be masked for another function, which has to unmask them then.
    fn hand_over(&mut self, masked: Masked) -> Option<Masked> {
        let others = self.0.values_mut().filter_map(|mask| mask.masked.as_mut());
        match { others }.find(|other| other.at == masked.at) {
            Some(other) => {
                other.inherit(masked);
                None
            }
            None => Some(masked),
        }
    }

    /// The functions whose mask ends by now.
    pub fn due(&self, now: Instant) -> Vec<Sbdf> {
        self.0.iter().filter(|(_, mask)| mask.until <= now).map(|(address, _)| *address).collect()
    }

    /// When the next mask ends.
    pub fn next(&self) -> Option<Instant> {
        self.0.values().map(|mask| mask.until).min()
    }

    /// Removes all masks; returns what is to be unmasked, in order.
    fn take_all(&mut self) -> impl Iterator<Item = Masked> + use<> {
        std::mem::take(&mut self.0).into_values().rev().filter_map(|mask| mask.masked)
    }
}

impl Errors {
    /// Masks a function's correctable errors for some time.
    pub(super) fn mask(&mut self, address: Sbdf, length: Duration, context: &Context<'_>) {
        let position = self.watched.position(address);
        let pf = position.and_then(|position| position.physical_function);
        self.masks.begin(address, Instant::now() + length);
        self.watched.forget_correctable(address);
        let (platform, inbox) = (context.platform.clone(), context.inbox.clone());
        let work = move || registers::mask(platform.host.as_ref(), address, pf);
        context.inbox.background(&format!("mask {address}"), work, move |masked| {
            let masked = masked.map_err(|failure| failure.to_string()).and_then(|masked| masked);
            inbox.send(engine::Event::Errors(Event::Masked(address, masked)));
        });
    }

    pub(super) fn masked(
        &mut self,
        address: Sbdf,
        outcome: Result<Masked, String>,
        context: &Context<'_>,
    ) -> Vec<Effect> {
        let outcome = match outcome {
            Ok(masked) => {
                let text = format!("correctable errors are masked at {}", masked.at);
                if let Some(masked) = self.masks.masked(address, masked) {
                    lift(address, masked, context);
                }
                Ok(text)
            }
            // The entry stays in the list: repeated attempts would not help.
            Err(why) => Err(format!("correctable errors cannot be masked: {why}")),
        };
        vec![Effect::Report(address, outcome)]
    }

    pub(super) fn unmask(&mut self, address: Sbdf, context: &Context<'_>) {
        if let Some(masked) = self.masks.remove(address) {
            lift(address, masked, context);
        }
    }

    /// Unmasks everything before the service stops; otherwise it would stay masked.
    pub(in crate::engine) fn unmask_all(&mut self, host: &dyn Host) {
        for masked in self.masks.take_all() {
            if let Err(why) = registers::unmask(host, masked) {
                warn!("unmask correctable errors: {why}");
            }
        }
    }
}

fn lift(address: Sbdf, masked: Masked, context: &Context<'_>) {
    let (platform, inbox) = (context.platform.clone(), context.inbox.clone());
    let work = move || registers::unmask(platform.host.as_ref(), masked);
    context.inbox.background(&format!("unmask {address}"), work, move |outcome| {
        let outcome = outcome.map_err(|failure| failure.to_string()).and_then(|outcome| outcome);
        inbox.send(engine::Event::Errors(Event::Unmasked(address, outcome)));
    });
}

pub(super) fn unmasked(address: Sbdf, outcome: Result<(), String>) -> Vec<Effect> {
    match outcome {
        Ok(()) => {
            let report = Effect::Report(address, Ok("correctable errors are reported again".to_owned()));
            vec![Effect::Resolved(address), report]
        }
        Err(why) => {
            let why = format!("correctable errors stay masked: {why}");
            let problem = Problem::new(Cause::ErrorReporting, format!("{address}: {why}")).on(address);
            vec![Effect::Report(address, Err(why)), Effect::Problem(problem)]
        }
    }
}
