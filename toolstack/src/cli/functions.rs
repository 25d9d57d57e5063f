//! One function, or all functions of a device as `BB:DD.*` in the syntax of xl.

use std::fmt;
use std::str::FromStr;

use pciback::{FunctionState, Sbdf};

use crate::outcome::Failure;
use crate::protocol::{FunctionView, ListFilter, Request, Success};
use crate::target::Target;

/// The functions that an argument of the command line names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Functions {
    /// One function.
    One(Target),
    /// All functions with the device number of this one.
    OfDevice(Sbdf),
}

/// The functions of a device to which a command applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Concerned<'a> {
    /// All functions.
    Every,
    /// Functions that do not belong to dom0.
    NotTheHosts,
    /// Functions that this guest has, given by its name or number.
    OfGuest(&'a str),
}

impl FromStr for Functions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_suffix(".*").map(|device| format!("{device}.0").parse()) {
            Some(Ok(first)) => Ok(Self::OfDevice(first)),
            _ => text.parse().map(Self::One),
        }
    }
}

impl fmt::Display for Functions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(target) => target.fmt(f),
            Self::OfDevice(first) => {
                write!(f, "{:04x}:{:02x}:{:02x}.*", first.segment(), first.bus(), first.device())
            }
        }
    }
}

/// Sends a request to the service.
pub type SendRequest<'a> = dyn FnMut(Request<Target>) -> Result<Success, Failure> + 'a;

impl Functions {
    /// The single functions; those of a device are requested from the service.
    pub(super) fn each(
        self,
        concerned: Concerned<'_>,
        ask: &mut SendRequest<'_>,
    ) -> Result<Vec<Target>, Failure> {
        let first = match self {
            Self::One(target) => return Ok(vec![target]),
            Self::OfDevice(first) => first,
        };
        let Success::Listed { functions } = ask(Request::List { filter: ListFilter::default() })? else {
            return Err(Failure::refused("xpcid did not list the functions of the host"));
        };
        let of_device = |address: Sbdf| {
            (address.segment(), address.bus(), address.device())
                == (first.segment(), first.bus(), first.device())
        };
        let found: Vec<FunctionView> = functions.into_iter().map(|listed| listed.function).collect();
        let those = |applies: &dyn Fn(&FunctionView) -> bool| -> Vec<Target> {
            let of_device = found.iter().filter(|function| of_device(function.address));
            of_device.filter(|function| applies(function)).map(|function| function.address.into()).collect()
        };
        if those(&|_| true).is_empty() {
            return Err(Failure::not_found(format!("there is no function at {}", Self::OfDevice(first)))
                .hint("'xpci list' shows the host's functions"));
        }
        let chosen = those(&|function| match concerned {
            Concerned::Every => true,
            Concerned::NotTheHosts => function.state != FunctionState::Host,
            Concerned::OfGuest(name) => {
                function.domain_name.as_deref() == Some(name)
                    || function.domain.is_some_and(|domain| domain.to_string() == name)
            }
        });
        if !chosen.is_empty() {
            return Ok(chosen);
        }
        // The command applies to none of them. The service answers so for each that no guest has.
        let free = those(&|function| function.domain.is_none());
        if free.is_empty() {
            let text = format!("other guests have the functions of {}", Self::OfDevice(first));
            return Err(Failure::not_found(text).hint("'xpci list' shows who has them"));
        }
        Ok(free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_all_its_functions_as_in_xl() {
        for (text, meant) in [("01:00.*", "0000:01:00.*"), ("12ab:01:1f.*", "12ab:01:1f.*"), ("eth0", "eth0")]
        {
            assert_eq!(text.parse::<Functions>().unwrap().to_string(), meant);
        }
        for text in ["01:20.*", "01.*", ".*", "01:00.0.*", "01:00.**", "*"] {
            text.parse::<Functions>().unwrap_err();
        }
    }
}
