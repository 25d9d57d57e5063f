//! Our walk of the capability lists against lspci's, on every dump in `tests/dumps`.

#[cfg(test)]
mod composed;
#[cfg(test)]
mod composer;
#[cfg(test)]
mod malformed;
#[cfg(test)]
mod walks;
