//! The virtual config space against composed devices and a naive model of what each byte means.

#[cfg(test)]
mod canary;
#[cfg(test)]
mod corpus;
#[cfg(test)]
mod device_registers;
#[cfg(test)]
mod devices;
#[cfg(test)]
mod document;
#[cfg(test)]
mod express;
#[cfg(test)]
mod functions;
#[cfg(test)]
mod groups;
#[cfg(test)]
mod guest_vfs;
#[cfg(test)]
mod hardware;
#[cfg(test)]
mod images;
#[cfg(test)]
mod learning;
#[cfg(test)]
mod linux;
#[cfg(test)]
mod lists;
#[cfg(test)]
mod mailbox;
#[cfg(test)]
mod model;
#[cfg(test)]
mod peers;
#[cfg(test)]
mod policies;
#[cfg(test)]
mod replacement;
#[cfg(test)]
mod rules;
