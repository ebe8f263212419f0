//! CloudFormation's resource signal: the answer that a stack waits for before it goes on.

use anyhow::Result;
use aws_config::SdkConfig;
use aws_sdk_cloudformation::Client;
use aws_sdk_cloudformation::error::ProvideErrorMetadata as _;
use aws_sdk_cloudformation::types::ResourceSignalStatus;

use super::{Delivery, describe};

/// Signals a resource of a stack, with the instance's id as the signal's unique id.
///
/// A stack that is complete "cannot be signaled": an ordinary state for a host that boots again, or
/// that Auto Scaling launched later.
pub(crate) async fn signal(
    sdk: &SdkConfig,
    stack: &str,
    resource: &str,
    instance_id: &str,
    success: bool,
) -> Result<Delivery> {
    let status =
        if success { ResourceSignalStatus::Success } else { ResourceSignalStatus::Failure };
    let result = Client::new(sdk)
        .signal_resource()
        .stack_name(stack)
        .logical_resource_id(resource)
        .unique_id(instance_id)
        .status(status)
        .send()
        .await;
    match result {
        Ok(_) => Ok(Delivery::Acknowledged),
        Err(e) => match e.as_service_error().and_then(|s| s.message()) {
            Some(text) if text.contains("cannot be signaled") => {
                Ok(Delivery::NothingWaits(text.to_owned()))
            }
            _ => Err(describe(&e).context("CloudFormation SignalResource")),
        },
    }
}
