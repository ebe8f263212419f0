//! The instance metadata service, version 2 only.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use aws_config::imds::Client;
use aws_config::imds::client::error::ImdsError;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tracing::info;

use super::Patience;
use crate::host::identity;

/// Which instance this is: the instance identity document, as far as it is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all(deserialize = "camelCase"))]
pub struct Identity {
    /// `i-…`
    pub instance_id: String,
    /// Such as `us-east-1`.
    pub region: String,
    /// The account's number.
    pub account_id: String,
    /// Such as `us-east-1a`.
    pub availability_zone: String,
    /// Such as `m5.large`.
    pub instance_type: String,
    /// The AMI it was launched from.
    pub image_id: String,
}

/// A client with time-outs of ours.
pub(super) fn client(patience: Patience) -> Client {
    let seconds = Duration::from_secs;
    let (attempts, connect, read, operation) = match patience {
        Patience::Brief => (2, seconds(1), seconds(2), seconds(5)),
        Patience::Long => (4, seconds(2), seconds(5), seconds(20)),
    };
    Client::builder()
        .max_attempts(attempts)
        .connect_timeout(connect)
        .read_timeout(read)
        .operation_timeout(operation)
        .build()
}

/// Asks which instance this is. With [`Patience::Long`], and where the firmware says that this is
/// EC2, it insists for two minutes: at a first boot the service may not answer yet.
pub(super) async fn identity(patience: Patience) -> Result<Identity> {
    let insist = patience == Patience::Long && identity::firmware().is_ok_and(|f| f.is_ec2());
    let until = Instant::now() + Duration::from_secs(if insist { 120 } else { 0 });
    loop {
        let result = ask(if insist { Patience::Long } else { Patience::Brief }).await;
        match result {
            Err(e) if Instant::now() < until => {
                info!("{e:#}; asking again");
                sleep(Duration::from_secs(3)).await;
            }
            result => return result,
        }
    }
}

async fn ask(patience: Patience) -> Result<Identity> {
    let path = "/latest/dynamic/instance-identity/document";
    let document = get(&client(patience), path)
        .await?
        .with_context(|| format!("the metadata service has no {path}"))?;
    let identity: Identity =
        serde_json::from_str(&document).context("reading the instance identity document")?;
    if !identity::is_instance_id(&identity.instance_id) {
        return Err(anyhow!(
            "the instance identity document names {:?}, which is no instance id",
            identity.instance_id
        ));
    }
    Ok(identity)
}

/// The instance's tags, if it was launched with `InstanceMetadataTags=enabled`.
pub(super) async fn tags(patience: Patience) -> Result<Option<BTreeMap<String, String>>> {
    let client = client(patience);
    let Some(keys) = get(&client, "/latest/meta-data/tags/instance").await? else {
        return Ok(None);
    };
    let mut tags = BTreeMap::new();
    for key in keys.lines().filter(|k| !k.is_empty()) {
        if let Some(value) = get(&client, &format!("/latest/meta-data/tags/instance/{key}")).await?
        {
            tags.insert(key.to_owned(), value);
        }
    }
    Ok(Some(tags))
}

/// One item; none if the service says that there is none.
async fn get(client: &Client, path: &str) -> Result<Option<String>> {
    match client.get(path.to_owned()).await {
        Ok(value) => Ok(Some(value.as_ref().to_owned())),
        Err(ImdsError::ErrorResponse(response)) if response.response().status().as_u16() == 404 => {
            Ok(None)
        }
        Err(ImdsError::ErrorResponse(response)) => Err(anyhow!(
            "the instance metadata service answered {} for {path}",
            response.response().status().as_u16()
        )),
        Err(e) => {
            Err(anyhow!("the instance metadata service does not answer: {}", super::chain(&e)))
        }
    }
}
