//! The result of a run as a value, and its forms. What a verdict means is said here in words and in
//! JSON; nothing is judged here.

pub mod explain;
pub mod text;

use jiff::Timestamp;
use serde::Serialize;

use crate::aws::imds::Identity;
use crate::control::Verdict;
use crate::engine::Outcome;
use crate::readiness::Conclusion;

/// The version of the JSON form. A key may be added under the same version; none is removed or
/// changes its meaning.
pub const VERSION: u32 = 1;

/// One run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// [`VERSION`]
    pub version: u32,
    /// The program's version.
    pub hostagent: &'static str,
    /// `verify`, `plan`, `explain` or `provision`.
    pub command: &'static str,
    /// Which instance it ran on, if that is known.
    pub instance: Option<Identity>,
    /// The kernel's id of the boot it ran in.
    pub boot_id: Option<String>,
    /// When it began.
    pub started: Timestamp,
    /// When it ended.
    pub finished: Timestamp,
    /// Whether every control was looked at; a selection can never make a host ready.
    pub complete: bool,
    /// The worst of the verdicts.
    pub result: Overall,
    /// How it ended; a provisioning run's only.
    #[serde(flatten)]
    pub conclusion: Option<Conclusion>,
    /// The controls, in the order of the registry.
    pub controls: Vec<Outcome>,
}

/// The worst of several verdicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Overall {
    /// Everything is met.
    Pass,
    /// Something is not met.
    Fail,
    /// Nothing is known to be unmet, but something could not be judged.
    Unknown,
}

impl Overall {
    /// Of the outcomes; none at all is unknown.
    #[must_use]
    pub fn of(outcomes: &[Outcome]) -> Self {
        if outcomes.iter().any(|o| matches!(o.verdict, Verdict::Fail { .. })) {
            Self::Fail
        } else if outcomes.is_empty() || outcomes.iter().any(|o| !o.verdict.lets_through()) {
            Self::Unknown
        } else {
            Self::Pass
        }
    }
}

impl Report {
    /// The JSON form.
    #[must_use]
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self)
            .unwrap_or_else(|e| format!("{{\"version\": {VERSION}, \"error\": \"{e}\"}}"))
            + "\n"
    }
}
