//! From the last report to "ready", or not: the marker, the target, and the signals to
//! CloudFormation and Auto Scaling.
//!
//! Ready is said last and only once: after AWS acknowledged the success, or said that nothing waits
//! for it, the marker is written and the target started. Everything else says failure. The marker
//! lies in `/run`, so that readiness never outlives a boot and never travels in an image.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::aws::autoscaling::{self, Action};
use crate::aws::{Delivery, cloudformation};
use crate::control::Context;
use crate::engine::Outcome;
use crate::host::{files, identity};

/// The marker: while this file is there, the host is ready.
pub const MARKER: &str = "/run/hostagent/ready";

/// The target that units can wait for.
pub const TARGET: &str = "hostagent-ready.target";

/// The tags that are read; an instance may carry others that are nobody's business.
pub const TAGS: [&str; 4] = [STACK_TAG, RESOURCE_TAG, GROUP_TAG, HOOK_TAG];

/// The tags that name what waits for this host, where the configuration does not.
const STACK_TAG: &str = "aws:cloudformation:stack-name";
const RESOURCE_TAG: &str = "aws:cloudformation:logical-id";
const GROUP_TAG: &str = "aws:autoscaling:groupName";
const HOOK_TAG: &str = "hostagent:lifecycle-hook";

/// The marker's content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// The boot it was written in.
    pub boot_id: String,
    /// The instance it was written on.
    pub instance_id: String,
    /// When the host became ready.
    pub since: Timestamp,
}

/// Reads the marker, if there is one of this boot.
pub fn marker() -> Result<Option<Marker>> {
    let Some(text) = files::read_optional(Path::new(MARKER))? else { return Ok(None) };
    let marker: Marker =
        serde_json::from_str(&text).with_context(|| format!("reading {MARKER}"))?;
    Ok((marker.boot_id == identity::boot_id()?).then_some(marker))
}

/// What was said to whom.
#[derive(Debug, Serialize)]
pub struct Signal {
    /// The receiver, in words.
    pub to: String,
    /// `SUCCESS`, `FAILURE`, `CONTINUE` or `ABANDON`.
    pub said: &'static str,
    /// What became of it.
    pub delivery: Result<Delivery, String>,
}

/// How a run ended.
#[derive(Debug, Serialize)]
pub struct Conclusion {
    /// Whether the host is ready.
    pub ready: bool,
    /// The signals that were sent.
    pub signals: Vec<Signal>,
    /// Whether this run changed the host's readiness, or what is known of it.
    #[serde(skip)]
    pub news: bool,
    /// Why the host is not ready although every control is met.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// What waits for this host.
#[derive(Debug, Default, PartialEq, Eq)]
struct Waiting {
    stack: Option<(String, String)>,
    hook: Option<(String, String)>,
}

/// Ends a provisioning run. `outcomes` are those of all controls.
pub async fn conclude(cx: &Context, outcomes: &[Outcome]) -> Conclusion {
    let met = !outcomes.is_empty() && outcomes.iter().all(|o| o.verdict.lets_through());
    if met { succeed(cx).await } else { fail(cx, outcomes).await }
}

async fn succeed(cx: &Context) -> Conclusion {
    if cx.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
        let seconds = cx.config.run.deadline_seconds.get();
        return late(cx, format!("the run took longer than its deadline of {seconds} s")).await;
    }
    match marker() {
        // Said and acknowledged earlier in this boot: nothing is said twice.
        Ok(Some(_)) => {
            return match start_target(cx).await {
                Ok(news) => Conclusion { ready: true, signals: Vec::new(), news, trouble: None },
                Err(e) => unready(cx, Vec::new(), format!("{e:#}")).await,
            };
        }
        Ok(None) => {}
        Err(e) => warn!("the marker is written anew: {e:#}"),
    }
    let (waiting, trouble) = match waiting(cx).await {
        Ok(both) => both,
        Err(e) => {
            (Waiting::default(), Some(format!("who waits for this host is not known: {e:#}")))
        }
    };
    if let Some(trouble) = trouble {
        return unready(cx, Vec::new(), trouble).await;
    }
    let signals = send(cx, &waiting, true).await;
    let lost = signals.iter().find_map(|s| s.delivery.as_ref().err().map(|e| (&s.to, e)));
    if let Some((to, why)) = lost {
        let trouble = format!("{to} could not be told: {why}");
        return unready(cx, signals, trouble).await;
    }
    match mark(cx).await {
        Ok(()) => {
            info!(ready = true, "this host is ready");
            Conclusion { ready: true, signals, news: true, trouble: None }
        }
        Err(e) => unready(cx, signals, format!("{e:#}")).await,
    }
}

async fn fail(cx: &Context, outcomes: &[Outcome]) -> Conclusion {
    error!(ready = false, "this host is not ready: {}", reason(outcomes));
    withdraw(cx).await;
    Conclusion { ready: false, signals: tell_failure(cx).await, news: true, trouble: None }
}

/// Every control is met, but not in time: that is a failure like any other.
async fn late(cx: &Context, trouble: String) -> Conclusion {
    let conclusion = unready(cx, Vec::new(), trouble).await;
    Conclusion { signals: tell_failure(cx).await, ..conclusion }
}

/// Tells everybody who is known to wait.
async fn tell_failure(cx: &Context) -> Vec<Signal> {
    match waiting(cx).await {
        Ok((waiting, trouble)) => {
            if let Some(trouble) = trouble {
                warn!("{trouble}");
            }
            send(cx, &waiting, false).await
        }
        Err(e) => {
            warn!("nobody is told of the failure, because who waits is not known: {e:#}");
            Vec::new()
        }
    }
}

/// Every control is met, and yet the host cannot be called ready.
async fn unready(cx: &Context, signals: Vec<Signal>, trouble: String) -> Conclusion {
    error!(ready = false, "this host is not ready: {trouble}");
    withdraw(cx).await;
    Conclusion { ready: false, signals, news: true, trouble: Some(trouble) }
}

/// The controls that are not met, with their reasons, in one line.
#[must_use]
pub fn reason(outcomes: &[Outcome]) -> String {
    let unmet: Vec<String> = outcomes
        .iter()
        .filter(|o| !o.verdict.lets_through())
        .map(|o| format!("{} ({}: {})", o.about.id, o.verdict.word(), o.verdict.sentence()))
        .collect();
    if unmet.is_empty() { "no control was judged".to_owned() } else { unmet.join("; ") }
}

async fn mark(cx: &Context) -> Result<()> {
    let marker = Marker {
        boot_id: identity::boot_id()?,
        instance_id: cx.aws.identity().await?.instance_id.clone(),
        since: Timestamp::now(),
    };
    let text = serde_json::to_string_pretty(&marker).context("writing the marker")? + "\n";
    files::write_atomic(Path::new(MARKER), &text, 0o644)?;
    start_target(cx).await.map(drop)
}

/// Starts the target if it is not up; tells whether it had to.
async fn start_target(cx: &Context) -> Result<bool> {
    let systemd = cx.host.systemd().await?;
    if systemd.unit(TARGET).await?.active_state == "active" {
        return Ok(false);
    }
    systemd.start(TARGET, Duration::from_secs(60)).await?;
    Ok(true)
}

/// Takes readiness back as soon as a control is not met: the run that may restore it can take long,
/// and may not come to its end.
pub async fn doubt(cx: &Context) {
    if Path::new(MARKER).exists() {
        warn!(ready = false, "this host is not ready any more");
        withdraw(cx).await;
    }
}

/// Takes readiness back: the marker, then the target.
async fn withdraw(cx: &Context) {
    if let Err(e) = files::remove(Path::new(MARKER)) {
        error!("{e:#}");
    }
    let stop = async {
        let systemd = cx.host.systemd().await?;
        if systemd.unit(TARGET).await?.is_up() {
            systemd.stop(TARGET, Duration::from_secs(60)).await?;
        }
        anyhow::Ok(())
    };
    if let Err(e) = stop.await {
        error!("{e:#}");
    }
}

/// What waits, by configuration, else by the instance's tags; and what of it is only half known.
async fn waiting(cx: &Context) -> Result<(Waiting, Option<String>)> {
    let config = &cx.config.signal;
    let complete = config.stack.is_some() && config.resource.is_some();
    let complete = complete && config.group.is_some() && config.hook.is_some();
    let tags = match cx.aws.tags().await {
        Ok(tags) => tags,
        // What is configured is told even if the tags cannot be had.
        Err(e) if complete || config.stack.is_some() || config.group.is_some() => {
            if !complete {
                warn!("the instance's tags are not known: {e:#}");
            }
            std::collections::BTreeMap::new()
        }
        Err(e) => return Err(e.context("reading the instance's tags")),
    };
    Ok(pick(config, |tag| tags.get(tag).cloned()))
}

fn pick(
    config: &crate::config::Signal,
    tag: impl Fn(&str) -> Option<String>,
) -> (Waiting, Option<String>) {
    let or_tag = |value: &Option<String>, name| value.clone().or_else(|| tag(name));
    let (stack, resource) =
        (or_tag(&config.stack, STACK_TAG), or_tag(&config.resource, RESOURCE_TAG));
    let (group, hook) = (or_tag(&config.group, GROUP_TAG), or_tag(&config.hook, HOOK_TAG));
    let mut trouble = None;
    let stack = match (stack, resource) {
        (Some(stack), Some(resource)) => Some((stack, resource)),
        (Some(stack), None) => {
            trouble = Some(format!(
                "the stack is {stack}, but no resource is named; set signal.resource"
            ));
            None
        }
        // Auto Scaling passes a group's tags on; a resource without a stack is nobody's.
        (None, _) => None,
    };
    let hook = match (group, hook) {
        (Some(group), Some(hook)) => Some((group, hook)),
        (None, Some(hook)) => {
            trouble = Some(format!("the hook is {hook}, but no group is named; set signal.group"));
            None
        }
        // A group without a launch hook is an ordinary thing: it waits for nobody.
        (_, None) => None,
    };
    (Waiting { stack, hook }, trouble)
}

async fn send(cx: &Context, waiting: &Waiting, success: bool) -> Vec<Signal> {
    let mut signals = Vec::new();
    if let Some((stack, resource)) = &waiting.stack {
        let delivery = async {
            let id = &cx.aws.identity().await?.instance_id;
            cloudformation::signal(cx.aws.sdk().await?, stack, resource, id, success).await
        };
        let said = if success { "SUCCESS" } else { "FAILURE" };
        let to = format!("CloudFormation (stack {stack}, resource {resource})");
        signals.push(told(to, said, delivery.await));
    }
    // A group that was told to continue cannot be told otherwise: not while the stack is in doubt.
    let in_doubt = success && signals.iter().any(|s| s.delivery.is_err());
    if let Some((group, hook)) = &waiting.hook
        && !in_doubt
    {
        let action = if success { Action::Continue } else { Action::Abandon };
        let delivery = async {
            let id = &cx.aws.identity().await?.instance_id;
            autoscaling::complete(cx.aws.sdk().await?, group, hook, id, action).await
        };
        let said = if success { "CONTINUE" } else { "ABANDON" };
        let to = format!("Auto Scaling (group {group}, hook {hook})");
        signals.push(told(to, said, delivery.await));
    }
    signals
}

fn told(to: String, said: &'static str, delivery: Result<Delivery>) -> Signal {
    match &delivery {
        Ok(Delivery::Acknowledged) => info!("{to} was told {said}"),
        Ok(Delivery::NothingWaits(why)) => info!("{to} does not wait: {why}"),
        Err(e) => error!("{to} could not be told {said}: {e:#}"),
    }
    Signal { to, said, delivery: delivery.map_err(|e| format!("{e:#}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Signal as Configured;

    fn tags(tag: &str) -> Option<String> {
        match tag {
            STACK_TAG => Some("tag-stack".to_owned()),
            RESOURCE_TAG => Some("tag-resource".to_owned()),
            GROUP_TAG => Some("tag-group".to_owned()),
            HOOK_TAG => Some("tag-hook".to_owned()),
            _ => None,
        }
    }

    #[test]
    fn configuration_comes_before_tags_and_nothing_is_guessed() {
        let none = Configured::default();
        let waiting = pick(&none, tags).0;
        assert_eq!(waiting.stack, Some(("tag-stack".into(), "tag-resource".into())));
        assert_eq!(waiting.hook, Some(("tag-group".into(), "tag-hook".into())));
        let set = Configured {
            stack: Some("s".to_owned()),
            hook: Some("h".to_owned()),
            ..Configured::default()
        };
        let waiting = pick(&set, tags).0;
        assert_eq!(waiting.stack, Some(("s".into(), "tag-resource".into())));
        assert_eq!(waiting.hook, Some(("tag-group".into(), "h".into())));
        assert_eq!(pick(&none, |_| None), (Waiting::default(), None));
    }

    #[test]
    fn half_an_address_is_trouble_and_does_not_spoil_the_other() {
        let stack = Configured { stack: Some("s".to_owned()), ..Configured::default() };
        assert!(pick(&stack, |_| None).1.is_some());
        let hook =
            Configured { hook: Some("h".to_owned()), resource: Some("r".to_owned()), ..stack };
        let (waiting, trouble) = pick(&hook, |_| None);
        assert_eq!(waiting.stack, Some(("s".into(), "r".into())));
        assert!(trouble.is_some());
        let group = Configured { group: Some("g".to_owned()), ..Configured::default() };
        assert_eq!(pick(&group, |_| None), (Waiting::default(), None));
    }
}
