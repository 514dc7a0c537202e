//! How one key's value is read and written, and the macros from which the list of keys in `types.rs` is made.

use std::path::PathBuf;

use super::node::Node;
use super::reader::Reader;
use super::reference::Section;

/// Anything that can stand behind a key: a leaf, a list, an optional value, or a section.
pub(super) trait ConfigValue: Sized {
    /// Reads the value; a mistake is reported to `reader` and answered with some value, so that the rest of the file is
    /// still looked at.
    fn decode(node: &Node, reader: &mut Reader) -> Self;

    /// Answers for a key that is not in the file and has no default.
    fn missing(reader: &mut Reader) -> Self;

    /// The value as a tree that [`ConfigValue::decode`] reads back to an equal value.
    fn encode(&self) -> Node;

    /// Adds the dotted paths of all keys at and below `path`.
    fn keys(path: &str, out: &mut Vec<String>);

    /// What belongs there, for the reference.
    fn takes() -> String;

    /// What the words mean that it may be; empty where its key says enough.
    fn words() -> String {
        String::new()
    }

    /// Adds the sections at and below `path`.
    fn sections(_: &str, _: &mut Vec<Section>) {}
}

/// A value without keys of its own.
pub(super) trait Leaf: Sized {
    /// What belongs there, for messages.
    fn expected() -> String;

    /// The value, where `node` is one.
    fn read(node: &Node) -> Option<Self>;

    fn encode(&self) -> Node;

    /// Stands in for a value that was reported as wrong.
    fn fallback() -> Self;

    /// What to do about `node`, where that is not plain from [`Leaf::expected`].
    fn hint(_node: &Node) -> Option<String> {
        None
    }

    /// As [`ConfigValue::words`].
    fn words() -> String {
        String::new()
    }
}

impl<T: Leaf> ConfigValue for T {
    fn decode(node: &Node, reader: &mut Reader) -> Self {
        T::read(node).unwrap_or_else(|| {
            reader.unexpected(T::expected(), node.to_string(), T::hint(node));
            T::fallback()
        })
    }

    fn missing(reader: &mut Reader) -> Self {
        reader.missing(T::expected());
        T::fallback()
    }

    fn encode(&self) -> Node {
        Leaf::encode(self)
    }

    fn keys(path: &str, out: &mut Vec<String>) {
        out.push(path.to_string());
    }

    fn takes() -> String {
        T::expected()
    }

    fn words() -> String {
        <T as Leaf>::words()
    }
}

impl<T: ConfigValue> ConfigValue for Option<T> {
    fn decode(node: &Node, reader: &mut Reader) -> Self {
        (*node != Node::Null).then(|| T::decode(node, reader))
    }

    fn missing(_: &mut Reader) -> Self {
        None
    }

    fn encode(&self) -> Node {
        self.as_ref().map_or(Node::Null, T::encode)
    }

    fn keys(path: &str, out: &mut Vec<String>) {
        T::keys(path, out);
    }

    fn takes() -> String {
        format!("null or {}", T::takes())
    }

    fn words() -> String {
        T::words()
    }

    fn sections(path: &str, out: &mut Vec<Section>) {
        T::sections(path, out);
    }
}

impl<T: ConfigValue> ConfigValue for Vec<T> {
    fn decode(node: &Node, reader: &mut Reader) -> Self {
        match node {
            Node::List(items) => items
                .iter()
                .enumerate()
                .map(|(i, item)| reader.within(&i.to_string(), |r| T::decode(item, r)))
                .collect(),
            other => {
                reader.unexpected("a list", other.to_string(), Some("write [ ... ] around it".into()));
                Vec::new()
            }
        }
    }

    fn missing(reader: &mut Reader) -> Self {
        reader.missing("a list");
        Vec::new()
    }

    fn encode(&self) -> Node {
        Node::List(self.iter().map(T::encode).collect())
    }

    fn keys(path: &str, out: &mut Vec<String>) {
        T::keys(&format!("{path}.0"), out);
    }

    fn takes() -> String {
        "a list".into()
    }

    fn sections(path: &str, out: &mut Vec<Section>) {
        T::sections(&format!("{path}.0"), out);
    }
}

/// Values by names that are the user's own, in the order of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Keyed<T>(pub Vec<(String, T)>);

impl<T: ConfigValue> ConfigValue for Keyed<T> {
    fn decode(node: &Node, reader: &mut Reader) -> Self {
        if !matches!(node, Node::Map(_) | Node::Null) {
            reader.unexpected("a section with a key for each field", node.to_string(), None);
            return Self(Vec::new());
        }
        let names: Vec<&str> = match node {
            Node::Map(entries) => entries.iter().map(|(name, _)| name.as_str()).collect(),
            _ => Vec::new(),
        };
        // Only repeated keys can be wrong: every name is known.
        let entries = reader.entries(node, &names);
        Self(entries.iter().map(|(name, value)| (name.clone(), reader.within(name, |r| T::decode(value, r)))).collect())
    }

    fn missing(_: &mut Reader) -> Self {
        Self(Vec::new())
    }

    fn encode(&self) -> Node {
        Node::Map(self.0.iter().map(|(name, value)| (name.clone(), value.encode())).collect())
    }

    fn keys(path: &str, out: &mut Vec<String>) {
        T::keys(&format!("{path}.FIELD"), out);
    }

    fn takes() -> String {
        "a section with a key for each field".into()
    }

    fn sections(path: &str, out: &mut Vec<Section>) {
        T::sections(&format!("{path}.FIELD"), out);
    }
}

impl Leaf for bool {
    fn expected() -> String {
        "true or false".into()
    }

    fn read(node: &Node) -> Option<Self> {
        if let Node::Bool(value) = node { Some(*value) } else { None }
    }

    fn encode(&self) -> Node {
        Node::Bool(*self)
    }

    fn fallback() -> Self {
        false
    }
}

impl Leaf for String {
    fn expected() -> String {
        "a text".into()
    }

    fn read(node: &Node) -> Option<Self> {
        if let Node::Text(value) = node { Some(value.clone()) } else { None }
    }

    fn encode(&self) -> Node {
        Node::Text(self.clone())
    }

    fn fallback() -> Self {
        Self::new()
    }

    fn hint(node: &Node) -> Option<String> {
        match node {
            Node::Null => Some("write \"\" for an empty text".into()),
            Node::Bool(_) | Node::Int(_) | Node::Float(_) => Some(format!("write \"{node}\", with the quotes")),
            _ => None,
        }
    }
}

impl Leaf for PathBuf {
    fn expected() -> String {
        "a path".into()
    }

    fn read(node: &Node) -> Option<Self> {
        String::read(node).filter(|text| !text.is_empty()).map(PathBuf::from)
    }

    fn encode(&self) -> Node {
        Node::Text(self.to_string_lossy().into_owned())
    }

    fn fallback() -> Self {
        Self::new()
    }

    fn hint(node: &Node) -> Option<String> {
        String::hint(node).filter(|_| *node != Node::Null)
    }
}

impl Leaf for f64 {
    fn expected() -> String {
        "a number".into()
    }

    fn read(node: &Node) -> Option<Self> {
        match node {
            Node::Int(value) => Some(*value as f64),
            Node::Float(value) if value.is_finite() => Some(*value),
            _ => None,
        }
    }

    fn encode(&self) -> Node {
        Node::Float(*self)
    }

    fn fallback() -> Self {
        0.0
    }
}

/// Whole numbers; `250e3` is one, too.
macro_rules! whole_number {
    ($type:ty, $expected:literal) => {
        impl Leaf for $type {
            fn expected() -> String {
                $expected.into()
            }

            fn read(node: &Node) -> Option<Self> {
                const EXACT: f64 = (1u64 << 53) as f64;
                match node {
                    Node::Int(value) => Self::try_from(*value).ok(),
                    Node::Float(value) if value.fract() == 0.0 && value.abs() <= EXACT => {
                        Self::try_from(*value as i128).ok()
                    }
                    _ => None,
                }
            }

            fn encode(&self) -> Node {
                Node::Int(*self as i128)
            }

            fn fallback() -> Self {
                0
            }
        }
    };
}
whole_number!(u64, "a whole number of at least 0");
whole_number!(usize, "a whole number of at least 0");
whole_number!(i64, "a whole number");

impl Leaf for [f64; 2] {
    fn expected() -> String {
        "a list of two numbers".into()
    }

    fn read(node: &Node) -> Option<Self> {
        match node {
            Node::List(items) => match items.as_slice() {
                [first, second] => Some([f64::read(first)?, f64::read(second)?]),
                _ => None,
            },
            _ => None,
        }
    }

    fn encode(&self) -> Node {
        Node::List(self.iter().map(Leaf::encode).collect())
    }

    fn fallback() -> Self {
        [0.0; 2]
    }
}

/// What a value must fulfil beyond its type.
pub(super) struct Rule<T> {
    pub(super) expected: String,
    pub(super) holds: Box<dyn Fn(&T) -> bool>,
}

/// A rule from a sentence and a test.
pub(super) fn rule<T>(expected: impl Into<String>, holds: impl Fn(&T) -> bool + 'static) -> Rule<T> {
    Rule { expected: expected.into(), holds: Box::new(holds) }
}

/// A text around a caption.
pub(super) fn template() -> Rule<Option<String>> {
    rule("a text with {} in it", |text: &Option<String>| text.as_deref().is_none_or(has_place))
}

/// Whether a text has a place for another.
pub(super) fn has_place(text: &str) -> bool {
    text.contains("{}")
}

/// A field of the `.json` member.
pub(super) fn field() -> Rule<String> {
    rule("a field of the .json member; dots lead into objects", |field: &String| !field.trim().is_empty())
}

/// A whole number of at least `least`.
pub(super) fn at_least<T: PartialOrd + std::fmt::Display + Copy + 'static>(least: T) -> Rule<T> {
    rule(format!("a whole number of at least {least}"), move |value| *value >= least)
}

/// A number above 0.
pub(super) fn positive() -> Rule<f64> {
    rule("a number above 0", |value| *value > 0.0)
}

/// A number of at least 0.
pub(super) fn not_negative() -> Rule<f64> {
    rule("a number of at least 0", |value| *value >= 0.0)
}

/// A number from 0 to below 1.
pub(super) fn below_one() -> Rule<f64> {
    rule("a number from 0 to below 1", |value| (0.0..1.0).contains(value))
}

/// A number from 0 to 1.
pub(super) fn share() -> Rule<f64> {
    rule("a number from 0 to 1", |value| (0.0..=1.0).contains(value))
}

/// The path of `key` in the section at `path`.
pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_string() } else { format!("{path}.{key}") }
}

/// Declares a section: its struct, how it is read and written, and its part of the reference. `key: Type = default => rule` has a
/// default and a range; a key without `= default` must stand in the file, a section or an optional value may be left out.
macro_rules! section {
    (
        $(#[doc = $doc:literal])*
        pub struct $name:ident {
            $( $(#[doc = $key_doc:literal])* pub $key:ident: $type:ty $(= $default:expr)? $(=> $rule:expr)? ),* $(,)?
        }
    ) => {
        $(#[doc = $doc])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name {
            $( $(#[doc = $key_doc])* pub $key: $type, )*
        }

        impl $crate::config::value::ConfigValue for $name {
            fn decode(node: &Node, reader: &mut Reader) -> Self {
                let entries = reader.entries(node, &[$(stringify!($key)),*]);
                Self { $(
                    $key: reader.field(
                        entries,
                        stringify!($key),
                        section!(@optional $($default)?),
                        section!(@optional $($rule)?),
                    ),
                )* }
            }

            fn missing(reader: &mut Reader) -> Self {
                Self::decode(&Node::Map(Vec::new()), reader)
            }

            fn encode(&self) -> Node {
                Node::Map(vec![$( (stringify!($key).to_string(), ConfigValue::encode(&self.$key)) ),*])
            }

            fn keys(path: &str, out: &mut Vec<String>) {
                $( <$type as ConfigValue>::keys(&$crate::config::value::join(path, stringify!($key)), out); )*
            }

            fn takes() -> String {
                "a section".into()
            }

            fn sections(path: &str, out: &mut Vec<$crate::config::reference::Section>) {
                use $crate::config::reference::{Key, Section};
                let keys = vec![$(
                    Key::of::<$type>(
                        stringify!($key),
                        concat!($($key_doc),*),
                        section!(@optional $($default)?),
                        section!(@optional $($rule)?),
                    )
                ),*];
                Section::add(out, stringify!($name), path, concat!($($doc),*), keys);
                $( <$type as ConfigValue>::sections(&$crate::config::value::join(path, stringify!($key)), out); )*
            }
        }
    };
    (@optional) => { None };
    (@optional $value:expr) => { Some($value) };
}

/// Declares an enum whose variants are words in the file.
macro_rules! choice {
    (
        $(#[doc = $doc:literal])*
        pub enum $name:ident { $( $(#[doc = $variant_doc:literal])* $variant:ident = $word:literal ),* $(,)? }
    ) => {
        $(#[doc = $doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name {
            $( $(#[doc = $variant_doc])* $variant, )*
        }

        impl $name {
            /// Every choice.
            pub const ALL: &'static [Self] = &[$( Self::$variant ),*];

            /// The word that stands for it in a configuration file.
            pub fn as_str(self) -> &'static str {
                match self { $( Self::$variant => $word, )* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        words!($name [$( $word: concat!($($variant_doc),*) ),*]);
    };
}

/// Makes enums whose variants are words, with `ALL` and `as_str`, values of a key; with what their words mean for the reference.
macro_rules! words {
    ($($name:ident $([ $($word:literal: $meaning:expr),* ])?),*) => { $(
        impl Leaf for $name {
            fn expected() -> String {
                Self::ALL.iter().map(|choice| choice.as_str()).collect::<Vec<_>>().join(" | ")
            }

            fn read(node: &Node) -> Option<Self> {
                match node {
                    Node::Text(text) => Self::ALL.iter().copied().find(|choice| choice.as_str() == text),
                    _ => None,
                }
            }

            fn encode(&self) -> Node {
                Node::Text(self.as_str().to_string())
            }

            fn fallback() -> Self {
                Self::ALL[0]
            }

            $(
                fn words() -> String {
                    $crate::config::reference::meanings(&[$( ($word, $meaning) ),*])
                }
            )?
        }
    )* };
}

pub(super) use {choice, section, words};
