//! A JSON object that is changed without touching the rest: the keys stay in their order, and every
//! value that is not changed is written as it was, to the last digit.

use std::fmt;

use anyhow::{Context as _, Result, bail};
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

/// A key of the file, and what it is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// The key; that of an object within the object stands behind a dot.
    pub key: String,
    /// The value; none removes the key.
    pub value: Option<Value>,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(Value::String(text)) => write!(f, "{} to {text}", self.key),
            Some(value) => write!(f, "{} to {value}", self.key),
            None => write!(f, "{} to its default", self.key),
        }
    }
}

/// The object.
#[derive(Debug)]
pub struct Object(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;

        impl<'de> Visitor<'de> for Keys {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut keys: Vec<(String, Box<RawValue>)> = Vec::new();
                while let Some((key, value)) = map.next_entry()? {
                    // Which of the two counts is not for us to say.
                    if keys.iter().any(|(known, _)| *known == key) {
                        return Err(A::Error::custom(format!("the key {key:?} is there twice")));
                    }
                    keys.push((key, value));
                }
                Ok(Object(keys))
            }
        }

        deserializer.deserialize_map(Keys)
    }
}

impl Object {
    /// Reads an object; an empty text is an empty one, as it is to Docker.
    pub fn parse(text: &str) -> Result<Self> {
        if text.trim().is_empty() {
            return Ok(Self(Vec::new()));
        }
        Ok(serde_json::from_str(text)?)
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Result<Option<Value>> {
        let raw = self.0.iter().find(|(name, _)| name == key);
        raw.map(|(_, raw)| serde_json::from_str(raw.get()).with_context(|| key.to_owned()))
            .transpose()
    }

    /// Changes one key.
    pub fn apply(&mut self, setting: &Setting) -> Result<()> {
        self.change(&setting.key, setting.value.as_ref(), 0)
            .with_context(|| format!("setting {}", setting.key))
    }

    fn change(&mut self, key: &str, value: Option<&Value>, depth: usize) -> Result<()> {
        let (key, below) = key.split_once('.').map_or((key, None), |(key, rest)| (key, Some(rest)));
        let at = self.0.iter().position(|(name, _)| name == key);
        let raw = match (below, value) {
            (None, None) => None,
            (None, Some(value)) => Some(serde_json::to_string(value)?),
            (Some(rest), _) => {
                let text = at.map_or("null", |at| self.0[at].1.get());
                let mut inner = match text {
                    "null" => Self(Vec::new()),
                    text => serde_json::from_str(text)?,
                };
                inner.change(rest, value, depth + 1)?;
                Some(inner.text(depth + 1))
            }
        };
        match (at, raw.map(RawValue::from_string).transpose()?) {
            (Some(at), Some(raw)) => self.0[at].1 = raw,
            (Some(at), None) => drop(self.0.remove(at)),
            (None, Some(raw)) => self.0.push((key.to_owned(), raw)),
            (None, None) => bail!("there is no such key"),
        }
        Ok(())
    }

    /// The file, one key to a line.
    #[must_use]
    pub fn render(&self) -> String {
        self.text(0) + "\n"
    }

    fn text(&self, depth: usize) -> String {
        if self.0.is_empty() {
            return "{}".to_owned();
        }
        let pad = "  ".repeat(depth + 1);
        let lines: Vec<String> = (self.0.iter())
            .map(|(key, raw)| format!("{pad}{}: {}", Value::from(key.as_str()), raw.get()))
            .collect();
        format!("{{\n{}\n{}}}", lines.join(",\n"), "  ".repeat(depth))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn set(key: &str, value: impl Into<Option<Value>>) -> Setting {
        Setting { key: key.into(), value: value.into() }
    }

    fn changed(text: &str, settings: &[Setting]) -> Result<String> {
        let mut object = Object::parse(text)?;
        for setting in settings {
            object.apply(setting)?;
        }
        Ok(object.render())
    }

    #[test]
    fn what_is_not_changed_stays_as_it_was_written() {
        let text = "{\"zeta\": 1.0e3, \"mirrors\": [ \"a\",\n  \"b\" ],\n\"icc\":true, \
                    \"n\": 12345678901234567890123, \"log-opts\": {\"tag\": \"\\u0041\", \"max-size\": \"1g\"}}";
        let settings = [
            set("icc", json!(false)),
            set("log-opts.max-size", json!("10m")),
            set("new", json!(1)),
        ];
        let expected = "{\n  \"zeta\": 1.0e3,\n  \"mirrors\": [ \"a\",\n  \"b\" ],\n  \"icc\": false,\n  \
                        \"n\": 12345678901234567890123,\n  \"log-opts\": {\n    \"tag\": \"\\u0041\",\n    \
                        \"max-size\": \"10m\"\n  },\n  \"new\": 1\n}\n";
        assert_eq!(changed(text, &settings).unwrap(), expected);
        // Again it is the same.
        assert_eq!(changed(expected, &settings).unwrap(), expected);
    }

    #[test]
    fn keys_are_added_and_removed() {
        let table = [
            ("", set("a", json!(true)), "{\n  \"a\": true\n}\n"),
            ("  \n", set("a.b", json!("x")), "{\n  \"a\": {\n    \"b\": \"x\"\n  }\n}\n"),
            ("{\"a\": null}", set("a.b", json!("x")), "{\n  \"a\": {\n    \"b\": \"x\"\n  }\n}\n"),
            ("{\"a\": 1}", set("a", None), "{}\n"),
        ];
        for (text, setting, expected) in table {
            assert_eq!(changed(text, &[setting]).unwrap(), expected, "{text}");
        }
        assert!(changed("{}", &[set("a", None)]).is_err());
    }

    #[test]
    fn what_is_not_one_object_is_not_changed() {
        for text in ["[]", "{", "{}{}", "{\"a\": 1, \"a\": 2}", "1", "{\"a\": 1,}", "null"] {
            assert!(Object::parse(text).is_err(), "{text}");
        }
        assert!(changed("{\"log-opts\": []}", &[set("log-opts.max-size", json!("1m"))]).is_err());
        let object = Object::parse("{\"a\": [1]}").unwrap();
        assert_eq!(object.get("a").unwrap(), Some(json!([1])));
        assert_eq!(object.get("b").unwrap(), None);
    }
}
