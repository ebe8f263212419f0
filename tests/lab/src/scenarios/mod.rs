//! The scenarios, in one explicit list. Each shows one thing on an instance of its own.

mod boot;

use crate::stage::{Stage, Start};
use anyhow::Result;

/// One scenario.
pub struct Scenario {
    /// A stable name in kebab case.
    pub name: &'static str,
    /// What it shows, as one line.
    pub shows: &'static str,
    /// What it starts from.
    pub start: Start,
    /// The scenario itself: it fails by returning an error.
    pub run: fn(&mut Stage) -> Result<()>,
}

/// All scenarios, in the order they run.
pub const ALL: &[Scenario] = &[Scenario {
    name: "boot",
    shows: "the lab itself: an instance with its identity, metadata service and NVMe disks",
    start: Start::Booted,
    run: boot::run,
}];
