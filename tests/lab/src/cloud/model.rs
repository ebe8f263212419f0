//! What the simulated cloud's admin interface speaks of: what exists, what fails, what was called.

use crate::qemu;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// An instance as the cloud shows it. What is not set keeps the cloud's default.
#[derive(Debug, Clone, Serialize)]
pub struct Instance {
    /// `i-` and seventeen digits.
    pub id: String,
    /// The instance type.
    #[serde(rename = "type")]
    pub kind: String,
    /// `default`, `dedicated` or `host`.
    pub tenancy: String,
    /// What cloud-init runs at the first boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
    /// The instance's tags.
    pub tags: BTreeMap<String, String>,
    /// Whether the metadata service shows the tags.
    pub metadata_tags: bool,
    /// The id of the root volume.
    pub root_volume: String,
    /// Whether the root volume is encrypted.
    pub root_encrypted: bool,
    /// `required` or `optional`: whether the metadata service wants a token.
    pub http_tokens: String,
    /// The public key for the image's user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public_key: Option<String>,
}

impl Default for Instance {
    /// The instance that the image and the snapshots show by DMI, as it should be: dedicated, with an
    /// encrypted root volume.
    fn default() -> Self {
        Self {
            id: qemu::INSTANCE_ID.to_owned(),
            kind: qemu::INSTANCE_TYPE.to_owned(),
            tenancy: "dedicated".to_owned(),
            user_data: None,
            tags: BTreeMap::new(),
            metadata_tags: false,
            root_volume: qemu::ROOT_SERIAL.replacen("vol", "vol-", 1),
            root_encrypted: true,
            http_tokens: "required".to_owned(),
            public_key: None,
        }
    }
}

/// A volume of the simulated account.
#[derive(Debug, Clone, Serialize)]
pub struct Volume {
    /// `vol-` and seventeen digits.
    pub id: String,
    /// GiB.
    pub size: u32,
    /// Whether the API says that it is encrypted.
    pub encrypted: bool,
    /// The key it is encrypted with, as an ARN.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kms_key_id: Option<String>,
    /// The volume's tags.
    pub tags: BTreeMap<String, String>,
}

impl Volume {
    /// A volume of 1 GiB.
    pub fn new(id: &str, encrypted: bool) -> Self {
        let (id, tags) = (id.to_owned(), BTreeMap::new());
        Self { id, size: 1, encrypted, kms_key_id: None, tags }
    }

    /// The serial that the volume's NVMe disk has on Nitro.
    pub fn serial(&self) -> String {
        self.id.replacen('-', "", 1)
    }
}

/// A fault that the cloud answers with instead of the truth.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Fault {
    /// `ec2`, `autoscaling`, `cloudformation`, `sts` or `imds`.
    pub service: String,
    /// The call it applies to, for `imds` the beginning of a path; absent: all of the service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
    /// `error`, `empty`, `delay` or `hang`.
    pub kind: String,
    /// The AWS error code.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// The HTTP status, where it is not the code's usual one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// The message, where it is not the code's usual one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// How long a delay is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// How many calls it applies to; absent: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub times: Option<u32>,
}

/// A CloudFormation stack and what it was told.
#[derive(Debug, Clone, Deserialize)]
pub struct Stack {
    /// Such as `CREATE_COMPLETE`.
    pub status: String,
    /// In the order they came.
    pub signals: Vec<Signal>,
}

/// One SignalResource.
#[derive(Debug, Clone, Deserialize)]
pub struct Signal {
    /// The resource's logical id.
    pub resource: String,
    /// Who signalled: the instance's id.
    pub unique_id: String,
    /// `SUCCESS` or `FAILURE`.
    pub status: String,
}

/// An Auto Scaling group and what it was told.
#[derive(Debug, Clone, Deserialize)]
pub struct Group {
    /// The lifecycle state of its instance, such as `InService`.
    pub state: String,
    /// In the order they came.
    pub completions: Vec<Completion>,
}

/// One CompleteLifecycleAction.
#[derive(Debug, Clone, Deserialize)]
pub struct Completion {
    /// The instance's id.
    pub instance: String,
    /// The hook's name.
    pub hook: String,
    /// `CONTINUE` or `ABANDON`.
    pub result: String,
}

/// One call that reached the cloud.
#[derive(Debug, Clone, Deserialize)]
pub struct Call {
    /// When it was answered, in UTC.
    pub time: String,
    /// `ec2`, `autoscaling`, `cloudformation`, …
    pub service: String,
    /// Such as `DescribeInstances`.
    pub action: String,
    /// What was asked.
    pub params: Value,
    /// Absent for a call that never got an answer.
    pub status: Option<u16>,
    /// The AWS error code, if it was an error.
    pub error: Option<String>,
}

impl std::fmt::Display for Call {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{} {} {} {}", self.time, self.service, self.action, self.params)?;
        match self.status {
            Some(status) => write!(out, " -> {status}")?,
            None => write!(out, " -> no answer")?,
        }
        self.error.iter().try_for_each(|error| write!(out, " {error}"))
    }
}
