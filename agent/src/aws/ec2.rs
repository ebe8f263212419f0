//! EC2's own word on the instance and its volumes.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use aws_config::SdkConfig;
use aws_sdk_ec2::Client;
use aws_sdk_ec2::types::{Filter, Reservation};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tracing::info;

use super::{Patience, describe};
use crate::host::block::VolumeId;
use crate::readiness::TAGS;

/// What `DescribeInstances` says of an instance, as far as it is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// `Placement.Tenancy`; none if the answer has none.
    pub tenancy: Option<String>,
    /// `Tags`, those of [`TAGS`] only.
    pub tags: BTreeMap<String, String>,
}

/// What `DescribeVolumes` says of a volume and its attachment to this instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedVolume {
    /// `VolumeId`
    pub volume_id: VolumeId,
    /// `Attachments[].Device` for this instance.
    pub device: Option<String>,
    /// `Attachments[].State` for this instance: `attaching`, `attached`, `busy`, …
    pub attachment: Option<String>,
    /// `Encrypted`; none if the answer does not say.
    pub encrypted: Option<bool>,
    /// `KmsKeyId`, an ARN.
    pub kms_key_id: Option<String>,
    /// How many instances it is attached to.
    pub attachments: usize,
    /// `Size`, in GiB.
    pub size_gib: Option<u32>,
    /// `Tags`
    pub tags: BTreeMap<String, String>,
}

/// Asks for one instance. By filter and page, which draws on EC2's larger request bucket; an empty
/// answer right after launch means "not known yet" (EC2 is eventually consistent), never "no".
pub(super) async fn describe_instance(
    sdk: &SdkConfig,
    id: &str,
    patience: Patience,
) -> Result<Instance> {
    let client = Client::new(sdk);
    let insist = Duration::from_secs(if patience == Patience::Long { 120 } else { 0 });
    let until = Instant::now() + insist;
    let mut pause = Duration::from_secs(2);
    loop {
        let mut pages = client
            .describe_instances()
            .filters(Filter::builder().name("instance-id").values(id).build())
            .into_paginator()
            .send();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|e| describe(&e).context("EC2 DescribeInstances"))?;
            let mut instances = page.reservations().iter().flat_map(Reservation::instances);
            if let Some(instance) = instances.find(|i| i.instance_id() == Some(id)) {
                return Ok(Instance {
                    tenancy: instance
                        .placement()
                        .and_then(|p| p.tenancy())
                        .map(|t| t.as_str().to_owned()),
                    tags: instance
                        .tags()
                        .iter()
                        .filter_map(|t| Some((t.key()?.to_owned(), t.value()?.to_owned())))
                        .filter(|(key, _)| TAGS.contains(&key.as_str()))
                        .collect(),
                });
            }
        }
        if Instant::now() + pause > until {
            bail!("EC2 DescribeInstances: EC2 does not know {id}");
        }
        info!("EC2 does not know {id} yet; asking again in {} s", pause.as_secs());
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(30));
    }
}

/// Asks for all volumes attached to an instance. One call answers for mapping and encryption.
pub(super) async fn attached_volumes(
    sdk: &SdkConfig,
    instance_id: &str,
) -> Result<Vec<AttachedVolume>> {
    let client = Client::new(sdk);
    let mut pages = client
        .describe_volumes()
        .filters(Filter::builder().name("attachment.instance-id").values(instance_id).build())
        .into_paginator()
        .send();
    let mut volumes = Vec::new();
    while let Some(page) = pages.next().await {
        let page = page.map_err(|e| describe(&e).context("EC2 DescribeVolumes"))?;
        for volume in page.volumes() {
            let text = volume.volume_id().unwrap_or_default();
            let volume_id = VolumeId::parse(text)
                .ok_or_else(|| anyhow!("EC2 DescribeVolumes: {text:?} is no volume id"))?;
            let here = volume.attachments().iter().find(|a| a.instance_id() == Some(instance_id));
            volumes.push(AttachedVolume {
                volume_id,
                device: here.and_then(|a| a.device()).map(str::to_owned),
                attachment: here.and_then(|a| a.state()).map(|s| s.as_str().to_owned()),
                encrypted: volume.encrypted(),
                kms_key_id: volume.kms_key_id().map(str::to_owned),
                attachments: volume.attachments().len(),
                size_gib: volume.size().and_then(|gib| u32::try_from(gib).ok()),
                tags: volume
                    .tags()
                    .iter()
                    .filter_map(|t| Some((t.key()?.to_owned(), t.value()?.to_owned())))
                    .collect(),
            });
        }
    }
    Ok(volumes)
}
