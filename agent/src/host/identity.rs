//! Which machine and which boot this is, without asking the network.
//!
//! On Nitro the board's asset tag is the instance id (FACTS of EC2's DMI tables); Xen has none.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// What the firmware says about the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Firmware {
    /// `sys_vendor`; `Amazon EC2` on Nitro.
    pub vendor: Option<String>,
    /// The instance id, where the board's asset tag holds one.
    pub instance_id: Option<String>,
}

impl Firmware {
    /// Whether the machine is an EC2 instance.
    #[must_use]
    pub fn is_ec2(&self) -> bool {
        self.vendor.as_deref() == Some("Amazon EC2")
    }
}

/// Reads the machine's DMI strings.
pub fn firmware() -> Result<Firmware> {
    let read = |name: &str| -> Result<Option<String>> {
        let path = Path::new("/sys/class/dmi/id").join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
        }
    };
    let tag = read("board_asset_tag")?;
    Ok(Firmware { vendor: read("sys_vendor")?, instance_id: tag.filter(|t| is_instance_id(t)) })
}

/// Whether a text has the form of an instance id: `i-` and 8 or 17 hexadecimal digits.
#[must_use]
pub fn is_instance_id(text: &str) -> bool {
    text.strip_prefix("i-").is_some_and(super::block::is_resource_suffix)
}

/// The kernel's random id of this boot.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(fs::read_to_string(path).with_context(|| format!("reading {path}"))?.trim().to_owned())
}
