//! Auto Scaling's launch hook: the answer that a group waits for before it gives an instance work.

use anyhow::Result;
use aws_config::SdkConfig;
use aws_sdk_autoscaling::Client;
use aws_sdk_autoscaling::error::ProvideErrorMetadata as _;

use super::{Delivery, describe};

/// What the group shall do with the instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Put it into service.
    Continue,
    /// Terminate and replace it.
    Abandon,
}

/// Completes the launch hook for this instance.
///
/// "No active Lifecycle Action" is an ordinary state, which only the message tells apart: the hook
/// was completed before, timed out, or the instance was already in service.
pub(crate) async fn complete(
    sdk: &SdkConfig,
    group: &str,
    hook: &str,
    instance_id: &str,
    action: Action,
) -> Result<Delivery> {
    let result = Client::new(sdk)
        .complete_lifecycle_action()
        .auto_scaling_group_name(group)
        .lifecycle_hook_name(hook)
        .instance_id(instance_id)
        .lifecycle_action_result(match action {
            Action::Continue => "CONTINUE",
            Action::Abandon => "ABANDON",
        })
        .send()
        .await;
    match result {
        Ok(_) => Ok(Delivery::Acknowledged),
        Err(e) => match e.as_service_error().and_then(|s| s.message()) {
            Some(text) if text.contains("No active Lifecycle Action found") => {
                Ok(Delivery::NothingWaits(text.to_owned()))
            }
            _ => Err(describe(&e).context("Auto Scaling CompleteLifecycleAction")),
        },
    }
}
