//! `instance-tenancy`: the instance's hardware is not shared with other accounts.

use serde::Serialize;

use crate::aws::ec2::Instance;
use crate::config::Config;
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};

/// See the module.
pub struct InstanceTenancy;

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// EC2's description of this instance.
    pub instance: Fact<Instance>,
}

impl Control for InstanceTenancy {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "instance-tenancy",
        title: "The instance runs on dedicated hardware",
        why: "The organisation's policy: no other account's code runs on the processor that works \
              on patient data. Only EC2's API knows it; the metadata service has no tenancy.",
        requires: &[],
        acts_after: &[],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        Facts { instance: cx.aws.instance().await }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let tenancy = facts.instance.known()?.tenancy.as_deref();
        let accepted: Vec<&str> = config.instance.tenancy.iter().map(|t| t.as_str()).collect();
        match tenancy {
            None => Err(Unknown("EC2's answer does not tell the tenancy".into())),
            Some(tenancy) if accepted.contains(&tenancy) => {
                Ok(Verdict::pass(format!("tenancy is {tenancy}")))
            }
            Some(tenancy) => Ok(Verdict::fail(
                format!("tenancy {}", accepted.join(" or ")),
                format!("tenancy is {tenancy}"),
                "launch the instance with Placement.Tenancy=dedicated (launch template or instance); \
                 the tenancy of a running instance cannot be changed",
            )),
        }
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        Ok(match self.judge(config, facts)? {
            Verdict::Pass { .. } => Plan::Nothing,
            _ => Plan::refuse("the tenancy of a running instance cannot be changed"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    fn facts(tenancy: Option<&str>) -> Facts {
        let tenancy = tenancy.map(str::to_owned);
        let instance = Instance { tenancy, tags: std::collections::BTreeMap::new() };
        Facts { instance: Fact::new("test", Ok(instance)) }
    }

    #[test]
    fn only_dedicated_hardware_passes() {
        let config = Config::default();
        for (tenancy, expected) in [
            (Some("dedicated"), "pass"),
            (Some("host"), "pass"),
            (Some("default"), "fail"),
            (Some("something-new"), "fail"),
            (Some(""), "fail"),
        ] {
            let verdict = InstanceTenancy.judge(&config, &facts(tenancy)).unwrap();
            assert_eq!(verdict.word(), expected, "{tenancy:?}");
        }
        assert!(InstanceTenancy.judge(&config, &facts(None)).is_err());
        let denied = Facts { instance: Fact::new("test", Err(anyhow!("UnauthorizedOperation"))) };
        assert_eq!(
            InstanceTenancy.judge(&config, &denied),
            Err(Unknown("UnauthorizedOperation".into()))
        );
    }

    #[test]
    fn a_narrower_policy_is_kept() {
        let mut config = Config::default();
        config.instance.tenancy = vec![crate::config::Tenancy::Host];
        let verdict = InstanceTenancy.judge(&config, &facts(Some("dedicated"))).unwrap();
        assert_eq!(verdict.word(), "fail");
    }
}
