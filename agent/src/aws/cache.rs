//! What is remembered of AWS's answers: that a volume is encrypted, which cannot change in a
//! volume's life. Bound to the volume and to the instance, so that an image made of this host
//! carries nothing over.

use std::path::Path;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::host::block::{VolumeId, Volumes};
use crate::host::files;

/// Where it is kept.
pub const PATH: &str = "/var/lib/hostagent/volume.json";

/// EC2's confirmation that these volumes are the encrypted data volumes of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confirmation {
    /// The form of this file.
    pub version: u32,
    /// The volumes, in the order of their ids.
    pub volumes: Vec<Confirmed>,
    /// The instance it was confirmed for.
    pub instance_id: String,
    /// The boot it was confirmed in, where it holds in that boot only: on Xen neither the disks nor
    /// the firmware tell who they are.
    pub boot_id: Option<String>,
    /// When EC2 said so.
    pub confirmed_at: Timestamp,
}

/// One confirmed volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confirmed {
    /// The volume.
    pub volume_id: VolumeId,
    /// The key it is encrypted with.
    pub kms_key_id: Option<String>,
    /// The kernel's name of its disk, where no serial number tells it.
    pub disk: Option<String>,
}

/// The form of file that this program writes and reads.
pub const VERSION: u32 = 2;

impl Confirmation {
    /// The volumes' ids.
    #[must_use]
    pub fn ids(&self) -> Volumes {
        self.volumes.iter().map(|v| v.volume_id.clone()).collect::<Vec<_>>().into()
    }

    /// Whether it says the same, whenever it was said.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        Self { confirmed_at: other.confirmed_at, ..self.clone() } == *other
    }
}

/// Reads what is remembered; none if nothing is. What cannot be read is an error.
pub fn read() -> Result<Option<Confirmation>> {
    let Some(text) = files::read_optional(Path::new(PATH))? else { return Ok(None) };
    let confirmation: Confirmation =
        serde_json::from_str(&text).with_context(|| format!("reading {PATH}"))?;
    anyhow::ensure!(
        confirmation.version == VERSION,
        "{PATH} is of version {}, not {VERSION}",
        confirmation.version
    );
    Ok(Some(confirmation))
}

/// Remembers a confirmation.
pub fn write(confirmation: &Confirmation) -> Result<()> {
    let text = serde_json::to_string_pretty(confirmation).context("writing a confirmation")? + "\n";
    files::write_atomic(Path::new(PATH), &text, 0o600)
}
