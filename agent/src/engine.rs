//! Runs controls as a graph: what does not depend on each other runs side by side, what stands
//! behind a control that is not met is blocked by it.
//!
//! [`verify`] and [`plan`] never change the host; [`provision`] applies what the controls plan,
//! observing afresh after every round. Nothing here knows any control by name.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use serde::Serialize;
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::control::{About, Check, Context, Finding, Plan, Verdict};
use crate::readiness;
use crate::step::{self, Step};

/// How long one control may take to observe while somebody waits for a report, and while a host is
/// made ready, when AWS is given time. Above the time-outs inside an observation.
const OBSERVE_BRIEF: Duration = Duration::from_secs(60);
const OBSERVE_LONG: Duration = Duration::from_secs(400);

/// A control's plan that has not settled after this many rounds never will.
const MAX_ROUNDS: usize = 6;

/// What became of one control in one run.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// The control.
    #[serde(flatten)]
    pub about: &'static About,
    /// The last verdict.
    pub verdict: Verdict,
    /// The facts behind it.
    pub facts: serde_json::Value,
    /// The steps that were planned or, when provisioning, applied.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Applied>,
    /// Why nothing was done about it although it is not met.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
}

/// A step and what became of it.
#[derive(Debug, Serialize)]
pub struct Applied {
    /// The step.
    pub step: Step,
    /// The same in words.
    pub text: String,
    /// What became of it.
    pub result: StepResult,
}

/// What became of a step.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepResult {
    /// It would be done.
    Planned,
    /// It was done.
    Done,
    /// It failed, and how.
    Failed(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Verify,
    Plan,
    Provision,
}

/// Observes and judges `controls`. Changes nothing.
pub async fn verify(cx: &Context, controls: &[&'static dyn Check]) -> Vec<Outcome> {
    run(cx, controls, Mode::Verify).await
}

/// Observes, judges and plans `controls`. Changes nothing.
pub async fn plan(cx: &Context, controls: &[&'static dyn Check]) -> Vec<Outcome> {
    run(cx, controls, Mode::Plan).await
}

/// Brings `controls` to where they are met, as far as their plans go. No step begins after the
/// context's deadline; one that has begun ends under its own.
pub async fn provision(cx: &Context, controls: &[&'static dyn Check]) -> Vec<Outcome> {
    run(cx, controls, Mode::Provision).await
}

async fn run(cx: &Context, controls: &[&'static dyn Check], mode: Mode) -> Vec<Outcome> {
    let selected: Vec<&str> = controls.iter().map(|c| c.about().id).collect();
    let mut waiting: Vec<&'static dyn Check> = controls.to_vec();
    let mut done: BTreeMap<&'static str, Outcome> = BTreeMap::new();
    let mut running = FuturesUnordered::new();
    loop {
        // Blocked controls may release others that then are blocked too: until nothing changes.
        loop {
            let before = waiting.len();
            waiting.retain(|control| {
                let about = control.about();
                let waits_for = match mode {
                    Mode::Provision => about.acts_after,
                    Mode::Verify | Mode::Plan => &[],
                };
                // What is not selected never comes, and so blocks.
                let open = |id: &&str| selected.contains(id) && !done.contains_key(id);
                if about.requires.iter().chain(waits_for).any(open) {
                    return true;
                }
                let unmet = |ids: &'static [&'static str]| -> Vec<&'static str> {
                    let is_unmet = |id: &&str| done.get(id).is_none_or(|o| !leads_on(o, mode));
                    ids.iter().copied().filter(is_unmet).collect()
                };
                let blockers = unmet(about.requires);
                if blockers.is_empty() {
                    running.push(one(cx, *control, mode, unmet(waits_for)));
                } else {
                    let why = format!("blocked by {}", blockers.join(", "));
                    let outcome = Outcome::without_facts(about, Verdict::Unknown { why });
                    report_progress(&outcome, mode);
                    done.insert(about.id, outcome);
                }
                false
            });
            if waiting.len() == before {
                break;
            }
        }
        let Some(outcome) = running.next().await else { break };
        report_progress(&outcome, mode);
        done.insert(outcome.about.id, outcome);
    }
    // Every control that was asked for has an outcome: one that was left over was never judged.
    controls
        .iter()
        .map(|control| {
            done.remove(control.about().id).unwrap_or_else(|| {
                let why = "was never reached".to_owned();
                Outcome::without_facts(control.about(), Verdict::Unknown { why })
            })
        })
        .collect()
}

/// Whether what depends on this outcome can go on: it is met, or (in a plan) would have been.
fn leads_on(outcome: &Outcome, mode: Mode) -> bool {
    let would_be = mode == Mode::Plan && !outcome.steps.is_empty() && outcome.refusal.is_none();
    outcome.verdict.lets_through() || would_be
}

async fn one(
    cx: &Context,
    control: &'static dyn Check,
    mode: Mode,
    held_back: Vec<&'static str>,
) -> Outcome {
    let about = control.about();
    let work = async {
        match mode {
            Mode::Verify => Outcome::from(about, check(cx, control).await),
            Mode::Plan => {
                let finding = check(cx, control).await;
                let steps = match &finding.plan {
                    Plan::Steps(steps) | Plan::Contain { steps, .. } => {
                        steps.iter().map(Applied::planned).collect()
                    }
                    Plan::Nothing | Plan::Refuse { .. } => Vec::new(),
                };
                Outcome { steps, ..Outcome::from(about, finding) }
            }
            Mode::Provision if held_back.is_empty() => converge(cx, control).await,
            Mode::Provision => {
                let mut outcome = Outcome::from(about, check(cx, control).await);
                if !outcome.verdict.lets_through() {
                    readiness::doubt(cx).await;
                    let why = format!("nothing is done before {} is met", held_back.join(", "));
                    outcome.refusal.get_or_insert(why);
                }
                outcome
            }
        }
    };
    match AssertUnwindSafe(work).catch_unwind().await {
        Ok(outcome) => outcome,
        Err(panic) => {
            let what = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            let why = format!("internal error, please report it: {what}");
            Outcome::without_facts(about, Verdict::Unknown { why })
        }
    }
}

async fn check(cx: &Context, control: &'static dyn Check) -> Finding {
    let limit = if cx.deadline.is_some() { OBSERVE_LONG } else { OBSERVE_BRIEF };
    tokio::time::timeout(limit, control.check(cx)).await.unwrap_or_else(|_| {
        let why = format!("was not observed within {} s", limit.as_secs());
        Finding {
            facts: serde_json::Value::Null,
            plan: Plan::refuse(why.clone()),
            verdict: Verdict::Unknown { why },
        }
    })
}

/// Observes and applies in turns until a control's plan is empty or cannot go on.
async fn converge(cx: &Context, control: &'static dyn Check) -> Outcome {
    let about = control.about();
    let mut applied: Vec<Applied> = Vec::new();
    let mut last: Vec<Step> = Vec::new();
    // No further round, and perhaps why: a step that failed says it itself.
    let (mut last_round, mut stopped) = (false, None);
    for _ in 0..MAX_ROUNDS {
        let finding = check(cx, control).await;
        if !finding.verdict.lets_through() {
            // Before anything is done about it: a host that was ready is so no more.
            readiness::doubt(cx).await;
        }
        let (steps, contained) = match &finding.plan {
            Plan::Steps(steps) => (steps.clone(), None),
            Plan::Contain { steps, why } => (steps.clone(), Some(why.clone())),
            Plan::Nothing | Plan::Refuse { .. } => (Vec::new(), None),
        };
        if last_round || steps.is_empty() || steps == last {
            let outcome = Outcome::from(about, finding);
            let refusal = stopped.or(outcome.refusal).filter(|_| !outcome.verdict.lets_through());
            return Outcome { steps: applied, refusal, ..outcome };
        }
        for step in &steps {
            if cx.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                stopped = Some(format!("the run's deadline passed before: {step}"));
                last_round = true;
                break;
            }
            info!(control = about.id, "{step}");
            let result = match step::apply(step, cx).await {
                Ok(()) => StepResult::Done,
                Err(e) => {
                    error!(control = about.id, "failed: {step}: {e:#}");
                    StepResult::Failed(format!("{e:#}"))
                }
            };
            last_round = matches!(result, StepResult::Failed(_));
            applied.push(Applied { text: step.to_string(), step: step.clone(), result });
            if last_round {
                break;
            }
        }
        last_round |= contained.is_some();
        stopped = stopped.or(contained);
        last = steps;
    }
    let why = format!("did not settle after {MAX_ROUNDS} rounds of steps");
    Outcome { steps: applied, ..Outcome::without_facts(about, Verdict::Unknown { why }) }
}

fn report_progress(outcome: &Outcome, mode: Mode) {
    if mode != Mode::Provision {
        return;
    }
    let (control, verdict) = (outcome.about.id, outcome.verdict.word());
    let sentence = outcome.verdict.sentence();
    if outcome.verdict.lets_through() {
        info!(control, verdict, "{verdict}: {sentence}");
    } else {
        warn!(control, verdict, "{verdict}: {sentence}");
        if let Some(why) = &outcome.refusal {
            warn!(control, verdict, "refused: {why}");
        }
    }
}

impl Applied {
    fn planned(step: &Step) -> Self {
        Self { text: step.to_string(), step: step.clone(), result: StepResult::Planned }
    }
}

impl Outcome {
    /// An outcome that rests on no observation.
    #[must_use]
    pub fn without_facts(about: &'static About, verdict: Verdict) -> Self {
        Self { about, verdict, facts: serde_json::Value::Null, steps: Vec::new(), refusal: None }
    }

    fn from(about: &'static About, finding: Finding) -> Self {
        let refusal = match finding.plan {
            Plan::Refuse { why } | Plan::Contain { why, .. } if !finding.verdict.lets_through() => {
                Some(why)
            }
            _ => None,
        };
        Self { about, verdict: finding.verdict, facts: finding.facts, steps: Vec::new(), refusal }
    }
}
