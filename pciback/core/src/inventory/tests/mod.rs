//! Repairs one by one, then any lists against a model of the host.

mod examples;
mod model;
mod properties;
mod scale;
mod worlds;
