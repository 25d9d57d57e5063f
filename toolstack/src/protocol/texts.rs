//! Access to the texts for people in answers and events.

use pciback::DomId;

use super::{EventView, FunctionView, Happening, Success};
use crate::outcome::{Failure, Obstacle};

impl Success {
    /// The domain ids of the guests in the answer, each with the field for its name.
    pub(crate) fn guests_mut(&mut self) -> Vec<(Option<DomId>, &mut Option<String>)> {
        let functions: Vec<&mut FunctionView> = match self {
            Self::Changed { functions, .. } | Self::Functions { functions } => functions.iter_mut().collect(),
            Self::Listed { functions } => functions.iter_mut().map(|listed| &mut listed.function).collect(),
            Self::Shown(shown) => vec![&mut shown.listed.function],
            Self::Vfs { vfs } => vfs.iter_mut().map(|vf| &mut vf.function).collect(),
            Self::Status(status) => status.functions.iter_mut().collect(),
            Self::VfNetwork(view) => return vec![(view.domain, &mut view.domain_name)],
            Self::VfNetworks { vfs, .. } => {
                return vfs.iter_mut().map(|view| (view.domain, &mut view.domain_name)).collect();
            }
            _ => Vec::new(),
        };
        functions.into_iter().map(|function| (function.domain, &mut function.domain_name)).collect()
    }

    /// The texts that may mention a guest.
    pub(crate) fn texts_mut(&mut self) -> Vec<&mut String> {
        let mut texts: Vec<&mut String> = Vec::new();
        match self {
            Self::Changed { message, warnings, functions } => {
                texts.push(message);
                texts.extend(warnings);
                texts.extend(notes(functions));
            }
            Self::Already { message } | Self::Possible { message } => texts.push(message),
            Self::Functions { functions } => texts.extend(notes(functions)),
            Self::Listed { functions } => {
                texts.extend(functions.iter_mut().filter_map(|listed| listed.function.note.as_mut()));
            }
            Self::Checkup { findings } => {
                for finding in findings {
                    texts.push(&mut finding.found);
                    texts.extend(&mut finding.mend);
                }
            }
            Self::Shown(shown) => {
                texts.extend(&mut shown.listed.function.note);
                texts.extend(&mut shown.uses);
                texts.extend(shown.obstacles.iter_mut().flat_map(Obstacle::texts_mut));
            }
            Self::Vfs { vfs } => texts.extend(vfs.iter_mut().filter_map(|vf| vf.function.note.as_mut())),
            Self::Synced(sync) => texts.extend(&mut sync.text),
            Self::Reloaded { functions, .. } => {
                for function in functions {
                    texts.extend(&mut function.deferred);
                    texts.extend(&mut function.failure);
                }
            }
            Self::Restored { warnings, .. } => texts.extend(warnings),
            Self::Status(status) => {
                texts.extend(notes(&mut status.functions));
                texts.extend(status.problems.iter_mut().map(|problem| &mut problem.message));
                texts.extend(&mut status.repaired);
            }
            _ => {}
        }
        texts
    }
}

fn notes(functions: &mut [FunctionView]) -> impl Iterator<Item = &mut String> {
    functions.iter_mut().filter_map(|function| function.note.as_mut())
}

impl Obstacle {
    fn texts_mut(&mut self) -> impl Iterator<Item = &mut String> {
        [&mut self.message].into_iter().chain(&mut self.hint)
    }
}

impl Failure {
    /// The message, the hint and the obstacles.
    pub(crate) fn texts_mut(&mut self) -> Vec<&mut String> {
        let obstacles = self.obstacles.iter_mut().flat_map(Obstacle::texts_mut);
        [&mut self.message].into_iter().chain(&mut self.hint).chain(obstacles).collect()
    }
}

impl EventView {
    /// The texts that may mention a guest.
    pub(crate) fn texts_mut(&mut self) -> Vec<&mut String> {
        match &mut self.what {
            Happening::Error { reason: text, .. } | Happening::Outcome { text, .. } => vec![text],
            _ => Vec::new(),
        }
    }
}
