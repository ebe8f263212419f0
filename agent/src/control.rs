//! What a control is: one requirement on the host, how it is observed, what the observation means,
//! and what would put it right. Also the registry, the one ordered list of all controls.
//!
//! The controls themselves are in [`crate::controls`], one file each. Running them in their order is
//! the business of [`crate::engine`]; changing the host is the business of [`crate::step`].

use std::future::Future;
use std::pin::Pin;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::aws::Aws;
use crate::config::Config;
use crate::controls;
use crate::host::Host;
use crate::step::Step;

/// One observed thing: its value or why it could not be learnt, where it was looked up, and when.
///
/// Absence is a value (`Fact<Option<T>>`); a failure to look is not absence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fact<T> {
    /// Where the value comes from: an API call, a file, a D-Bus property.
    pub source: String,
    /// When it was looked up.
    pub at: Timestamp,
    /// What was seen.
    #[serde(flatten)]
    pub seen: Seen<T>,
}

/// The outcome of looking at something.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seen<T> {
    /// It was seen.
    Value(T),
    /// It could not be looked at, and why.
    Unknown(String),
}

/// Why something cannot be judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unknown(pub String);

impl<T> Fact<T> {
    /// A fact looked up now.
    pub fn new(source: impl Into<String>, result: anyhow::Result<T>) -> Self {
        let seen = match result {
            Ok(value) => Seen::Value(value),
            Err(e) => Seen::Unknown(format!("{e:#}")),
        };
        Self { source: source.into(), at: Timestamp::now(), seen }
    }

    /// The value, or why there is none.
    pub fn known(&self) -> Result<&T, Unknown> {
        match &self.seen {
            Seen::Value(value) => Ok(value),
            Seen::Unknown(why) => Err(Unknown(why.clone())),
        }
    }
}

/// What a control's facts mean.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "kebab-case")]
pub enum Verdict {
    /// The requirement is met, and this was seen.
    Pass {
        /// What was seen, in a few words.
        observed: String,
    },
    /// The requirement is not met.
    Fail {
        /// What is required.
        expected: String,
        /// What was seen instead.
        observed: String,
        /// What an operator can do about it.
        remedy: String,
    },
    /// It could not be judged.
    Unknown {
        /// Why not.
        why: String,
    },
    /// The requirement does not concern this host.
    NotApplicable {
        /// Why not.
        why: String,
    },
}

impl Verdict {
    /// Whether a host with this verdict may become ready.
    #[must_use]
    pub fn lets_through(&self) -> bool {
        matches!(self, Self::Pass { .. } | Self::NotApplicable { .. })
    }

    /// The word for it in reports and in the journal.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Pass { .. } => "pass",
            Self::Fail { .. } => "fail",
            Self::Unknown { .. } => "unknown",
            Self::NotApplicable { .. } => "not-applicable",
        }
    }

    /// What was seen, or why nothing was, as one sentence.
    #[must_use]
    pub fn sentence(&self) -> &str {
        match self {
            Self::Pass { observed } | Self::Fail { observed, .. } => observed,
            Self::Unknown { why } | Self::NotApplicable { why } => why,
        }
    }

    /// A [`Verdict::Fail`].
    pub fn fail(
        expected: impl Into<String>,
        observed: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::Fail { expected: expected.into(), observed: observed.into(), remedy: remedy.into() }
    }

    /// A [`Verdict::Pass`].
    pub fn pass(observed: impl Into<String>) -> Self {
        Self::Pass { observed: observed.into() }
    }
}

/// What would put a control right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Plan {
    /// There is nothing to do.
    Nothing,
    /// These changes, in this order.
    Steps(Vec<Step>),
    /// Nothing that hostagent may do.
    Refuse {
        /// Why not.
        why: String,
    },
    /// Nothing that would meet the requirement, but these changes keep harm away meanwhile.
    Contain {
        /// The changes, in this order.
        steps: Vec<Step>,
        /// Why nothing more is done.
        why: String,
    },
}

impl Plan {
    /// A plan of these steps; no step is [`Plan::Nothing`].
    #[must_use]
    pub fn steps(steps: Vec<Step>) -> Self {
        if steps.is_empty() { Self::Nothing } else { Self::Steps(steps) }
    }

    /// A plan of these steps, after which these reasons still stand in the way.
    #[must_use]
    pub fn with_refusals(steps: Vec<Step>, refusals: &[String]) -> Self {
        let why = refusals.join("; ");
        match (steps.is_empty(), refusals.is_empty()) {
            (_, true) => Self::steps(steps),
            (true, false) => Self::Refuse { why },
            (false, false) => Self::Contain { steps, why },
        }
    }

    /// A refusal.
    pub fn refuse(why: impl Into<String>) -> Self {
        Self::Refuse { why: why.into() }
    }
}

/// What is always true of a control.
#[derive(Debug, Serialize)]
pub struct About {
    /// Stable kebab-case name.
    pub id: &'static str,
    /// The requirement, in a few words.
    pub title: &'static str,
    /// Why it is required.
    pub why: &'static str,
    /// Controls that must be met before this one can be: without them its facts mean nothing.
    pub requires: &'static [&'static str],
    /// Controls that must be met before this one's steps are applied, though it can be judged
    /// without them.
    pub acts_after: &'static [&'static str],
}

/// All that a control may look at.
#[derive(Debug)]
pub struct Context {
    /// The effective configuration.
    pub config: Config,
    /// The machine.
    pub host: Host,
    /// AWS.
    pub aws: Aws,
    /// When the run ends; a provisioning run's only. No step begins after it.
    pub deadline: Option<tokio::time::Instant>,
}

/// One requirement. See the module's documentation.
pub trait Control: Sync {
    /// What is observed; kept verbatim as evidence.
    type Facts: Serialize + Send + Sync;

    /// The control's description.
    const ABOUT: About;

    /// Looks at the host. Never changes it, never fails: what cannot be seen is an unknown fact.
    fn observe(&self, cx: &Context) -> impl Future<Output = Self::Facts>;

    /// What the facts mean. Pure. An unknown fact that is needed makes the verdict unknown.
    fn judge(&self, config: &Config, facts: &Self::Facts) -> Result<Verdict, Unknown>;

    /// What would put it right. Pure. An unknown fact that is needed makes it a refusal.
    fn plan(&self, config: &Config, facts: &Self::Facts) -> Result<Plan, Unknown>;
}

/// A control that was observed, judged and planned.
#[derive(Debug)]
pub struct Finding {
    /// The facts.
    pub facts: serde_json::Value,
    /// What they mean.
    pub verdict: Verdict,
    /// What would put it right.
    pub plan: Plan,
}

/// A [`Control`] of any kind of facts, as the registry holds it.
pub trait Check: Sync {
    /// The control's description.
    fn about(&self) -> &'static About;

    /// Observes, judges and plans.
    fn check<'a>(&'a self, cx: &'a Context) -> Pin<Box<dyn Future<Output = Finding> + 'a>>;
}

impl<C: Control> Check for C {
    fn about(&self) -> &'static About {
        &C::ABOUT
    }

    fn check<'a>(&'a self, cx: &'a Context) -> Pin<Box<dyn Future<Output = Finding> + 'a>> {
        Box::pin(async move {
            let facts = self.observe(cx).await;
            let verdict = self
                .judge(&cx.config, &facts)
                .unwrap_or_else(|Unknown(why)| Verdict::Unknown { why });
            let plan = self.plan(&cx.config, &facts).unwrap_or_else(|Unknown(why)| {
                Plan::refuse(format!("nothing is changed on what is not known: {why}"))
            });
            let facts = serde_json::to_value(&facts)
                .unwrap_or_else(|e| serde_json::json!({ "unserialisable": e.to_string() }));
            Finding { facts, verdict, plan }
        })
    }
}

/// All controls, in the order of reports. A control's prerequisites stand before it.
pub static REGISTRY: &[&dyn Check] = &[
    &controls::instance_tenancy::InstanceTenancy,
    &controls::sshd_port::SshdPort,
    &controls::sshd_hardening::SshdHardening,
    &controls::boot_order::BootOrder,
    &controls::swap::Swap,
    &controls::core_dumps::CoreDumps,
    &controls::data_volume::DataVolume,
    &controls::root_volume::RootVolume,
    &controls::data_filesystem::DataFilesystem,
    &controls::data_mount::DataMount,
    &controls::data_size::DataSize,
    &controls::docker_storage::DockerStorage,
    &controls::docker_daemon::DockerDaemon,
    &controls::container_storage::ContainerStorage,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prerequisites_exist_and_stand_before_what_needs_them() {
        for (i, control) in REGISTRY.iter().enumerate() {
            for needed in control.about().requires.iter().chain(control.about().acts_after) {
                let at = REGISTRY.iter().position(|c| c.about().id == *needed);
                assert!(at.is_some_and(|at| at < i), "{}: {needed}", control.about().id);
            }
        }
    }

    #[test]
    fn ids_are_unique_kebab_case() {
        let mut ids: Vec<_> = REGISTRY.iter().map(|c| c.about().id).collect();
        for id in &ids {
            assert!(id.chars().all(|c| c.is_ascii_lowercase() || c == '-'), "{id}");
        }
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), REGISTRY.len());
    }

    #[test]
    fn only_pass_and_not_applicable_let_a_host_through() {
        assert!(Verdict::pass("x").lets_through());
        assert!(Verdict::NotApplicable { why: "x".into() }.lets_through());
        assert!(!Verdict::fail("a", "b", "c").lets_through());
        assert!(!Verdict::Unknown { why: "x".into() }.lets_through());
    }
}
