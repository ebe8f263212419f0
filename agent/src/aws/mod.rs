//! All I/O with AWS: the instance metadata service, EC2, Auto Scaling and CloudFormation, and what
//! is remembered of their answers. Every call has a deadline, its retries included. What cannot change while the instance
//! runs is asked once per run; what EC2 says of the attached volumes is asked again only when the
//! kernel's disks have changed or a step asks for it.
//!
//! Endpoints, region and credentials are found as the AWS SDK finds them.

pub mod autoscaling;
pub mod cache;
pub mod cloudformation;
pub mod ec2;
pub mod imds;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::identity::IdentityCache;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_ec2::error::{ProvideErrorMetadata, SdkError};
use tokio::sync::{Mutex, OnceCell};

use crate::control::Fact;
use crate::host::block::Disk;
use ec2::{AttachedVolume, Instance};
use imds::Identity;

/// How long to insist when AWS does not answer or does not know yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Somebody waits for a report: seconds.
    Brief,
    /// A host is being made ready, perhaps in its first minute: minutes.
    Long,
}

/// What EC2 said of the volumes, and the kernel's disks at that time.
#[derive(Debug)]
struct VolumesAnswer {
    disks: Vec<Disk>,
    fact: Fact<Vec<AttachedVolume>>,
}

/// AWS, as seen from this instance.
#[derive(Debug)]
pub struct Aws {
    patience: Patience,
    identity: OnceCell<Result<Identity, String>>,
    sdk: OnceCell<SdkConfig>,
    instance: OnceCell<Fact<Instance>>,
    volumes: Mutex<Option<VolumesAnswer>>,
}

impl Aws {
    /// Nothing is asked until somebody wants to know.
    #[must_use]
    pub fn new(patience: Patience) -> Self {
        Self {
            patience,
            identity: OnceCell::new(),
            sdk: OnceCell::new(),
            instance: OnceCell::new(),
            volumes: Mutex::new(None),
        }
    }

    /// Which instance this is, by the metadata service. Asked once, whatever the answer is: how long
    /// to insist is [`Patience`]'s business.
    pub async fn identity(&self) -> Result<&Identity> {
        let ask = || async { imds::identity(self.patience).await.map_err(|e| format!("{e:#}")) };
        self.identity.get_or_init(ask).await.as_ref().map_err(|why| anyhow!("{why}"))
    }

    /// Which instance this is, as a fact.
    pub async fn identity_fact(&self) -> Fact<Identity> {
        Fact::new("IMDSv2 dynamic/instance-identity/document", self.identity().await.cloned())
    }

    /// What EC2 says of this instance. Its tenancy cannot change while it runs: asked once.
    pub async fn instance(&self) -> Fact<Instance> {
        // Boxed, as other calls of the SDK below: their futures are large.
        let ask = Box::pin(async {
            let result = async {
                let id = &self.identity().await?.instance_id;
                ec2::describe_instance(self.sdk().await?, id, self.patience).await
            };
            let fact = Fact::new("EC2 DescribeInstances", result.await);
            // Only an answer is worth keeping.
            if fact.known().is_ok() { Ok(fact) } else { Err(fact) }
        });
        match self.instance.get_or_try_init(|| ask).await {
            Ok(fact) => fact.clone(),
            Err(fact) => fact,
        }
    }

    /// The volumes that EC2 has attached to this instance. `disks` are the kernel's disks now: while
    /// they are the same as at the last answer, that answer stands. A disk of Xen's that went and came
    /// again, as another volume perhaps, is not the same: see [`Disk::sequence`].
    pub async fn attached_volumes(&self, disks: &[Disk]) -> Fact<Vec<AttachedVolume>> {
        let mut kept = self.volumes.lock().await;
        if let Some(answer) = &*kept
            && answer.disks == disks
        {
            return answer.fact.clone();
        }
        let result = async {
            let id = &self.identity().await?.instance_id;
            ec2::attached_volumes(self.sdk().await?, id).await
        };
        let fact = Fact::new("EC2 DescribeVolumes", result.await);
        // An error too: what is throttled is not asked again for every event of the kernel.
        *kept = Some(VolumesAnswer { disks: disks.to_vec(), fact: fact.clone() });
        fact
    }

    /// Forgets what EC2 said of the volumes, so that it is asked again.
    pub async fn forget_volumes(&self) {
        *self.volumes.lock().await = None;
    }

    /// The instance's tags: EC2's answer if there is one, else the metadata service's, which has
    /// them only if the instance was launched so.
    pub async fn tags(&self) -> Result<BTreeMap<String, String>> {
        let instance = self.instance().await;
        match instance.known() {
            Ok(instance) => Ok(instance.tags.clone()),
            Err(unknown) => match imds::tags(self.patience).await {
                Ok(Some(tags)) => Ok(tags),
                Ok(None) => Err(anyhow!("{}; the metadata service has no tags", unknown.0)),
                Err(e) => Err(e.context(unknown.0)),
            },
        }
    }

    /// The SDK's configuration. Needs the metadata service: region and credentials come from there.
    pub(crate) async fn sdk(&self) -> Result<&SdkConfig> {
        // Without identity there are no credentials either; asking for them would only cost time.
        let identity = self
            .identity()
            .await
            .context("no AWS API can be asked without the metadata service")?;
        Ok(self.sdk.get_or_init(|| load(self.patience, &identity.region)).await)
    }
}

async fn load(patience: Patience, region: &str) -> SdkConfig {
    let seconds = Duration::from_secs;
    let (attempts, attempt, operation) = match patience {
        Patience::Brief => (3, seconds(5), seconds(15)),
        Patience::Long => (8, seconds(15), seconds(75)),
    };
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(seconds(4))
        .operation_attempt_timeout(attempt)
        .operation_timeout(operation)
        .build();
    // The SDK gives the metadata service one second to answer, which a busy first boot exceeds.
    let credentials = DefaultCredentialsChain::builder()
        .imds_client(imds::client(patience))
        .region(Region::new(region.to_owned()))
        .build()
        .await;
    aws_config::defaults(BehaviorVersion::latest())
        .credentials_provider(credentials)
        .identity_cache(IdentityCache::lazy().load_timeout(operation).build())
        // The instance's own, whatever the environment says.
        .region(Region::new(region.to_owned()))
        .retry_config(RetryConfig::standard().with_max_attempts(attempts))
        .timeout_config(timeouts)
        .app_name(
            aws_config::AppName::new(concat!("hostagent-", env!("CARGO_PKG_VERSION")))
                .expect("a valid name"),
        )
        .load()
        .await
}

/// An SDK error in one line: the service's own code and message, else the chain of causes. Never
/// the raw request or response, which hold credentials.
fn describe<E, R>(error: &SdkError<E, R>) -> anyhow::Error
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
    R: std::fmt::Debug,
{
    if let Some(service) = error.as_service_error() {
        return match (service.code(), service.message()) {
            (Some(code), Some(message)) => anyhow!("{code}: {message}"),
            (Some(code), None) => anyhow!("{code}"),
            _ => anyhow!("the service answered with an error that has no code"),
        };
    }
    anyhow!(chain(error))
}

/// An error and its causes, without repetitions.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

/// What became of a signal.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Delivery {
    /// AWS acknowledged it.
    Acknowledged,
    /// There is nothing that waits for it any more, and that is normal.
    NothingWaits(String),
}
