//! Parameters of the running kernel (proc_sys(5)), and whether it keeps a second one for its crash.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::files;

/// Where a core dump goes: a path, or a `|` and a program.
pub const CORE_PATTERN: &str = "kernel.core_pattern";

/// The value of a parameter, such as `kernel.core_pattern`.
pub fn get(name: &str) -> Result<String> {
    let path = path(name);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(text.trim_end_matches('\n').to_owned())
}

/// Sets a parameter.
pub fn set(name: &str, value: &str) -> Result<()> {
    let path = path(name);
    fs::write(&path, value).with_context(|| format!("writing {value:?} to {}", path.display()))
}

fn path(name: &str) -> PathBuf {
    Path::new("/proc/sys").join(name.replace('.', "/"))
}

/// Whether a kernel is loaded that is started when this one crashes, to save its memory (kdump).
pub fn crash_kernel_is_loaded() -> Result<bool> {
    // Without support for it in the kernel there is no such file.
    let text = files::read_optional(Path::new("/sys/kernel/kexec_crash_loaded"))?;
    Ok(text.is_some_and(|text| text.trim() != "0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read() {
        assert!(!get("kernel.ostype").unwrap().is_empty());
        assert!(get("kernel.no_such_parameter").is_err());
    }
}
