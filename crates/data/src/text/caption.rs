//! Which text of a sample is its caption.

use serde_json::Value;

use crate::SampleError;
use crate::keyed::{KeyedRng, key};
use crate::text::question::QuestionFields;

/// Where a data set keeps its captions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CaptionSource {
    /// The `.txt` member, where there is none this field of the `.json` member.
    TextOr(JsonPath),
    /// The `.txt` member.
    Text,
    /// A field of the `.json` member.
    Json(JsonPath),
    /// A list of texts in the `.json` member, one of which is drawn each time; the first few, where `top` is given.
    Drawn {
        /// Field that holds the list.
        field: JsonPath,
        /// How many of its texts are drawn from; `None`: all.
        top: Option<usize>,
    },
    /// A question in the `.json` member, which has people's answers beside it.
    Question(QuestionFields),
}

/// How a data set's captions are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptionRule {
    /// Where they are.
    pub source: CaptionSource,
    /// A text in which `{}` stands for the caption.
    pub template: Option<String>,
}

impl Default for CaptionRule {
    fn default() -> Self {
        Self { source: CaptionSource::TextOr(JsonPath::new("caption")), template: None }
    }
}

/// Names a value in an object, and in objects inside it: `quality.similarity`. An object's own key with dots in it goes
/// before a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonPath(String);

impl JsonPath {
    /// The path as it is written.
    pub fn new(path: impl Into<String>) -> JsonPath {
        JsonPath(path.into())
    }

    /// The path as it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn find<'v>(&self, value: &'v Value) -> Option<&'v Value> {
        fn walk<'v>(value: &'v Value, path: &str) -> Option<&'v Value> {
            if let Some(found) = value.get(path) {
                return Some(found);
            }
            let mut dots = path.match_indices('.').map(|(at, _)| at);
            dots.find_map(|at| walk(value.get(&path[..at])?, &path[at + 1..]))
        }
        walk(value, &self.0)
    }
}

/// Which of several captions is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pick {
    /// The first: in evaluation.
    First,
    /// The one that belongs to a stream position.
    Keyed {
        /// Seed of the stream.
        seed: u64,
        /// Where in it.
        position: u64,
    },
}

/// Whether something is left of a caption when it is cleaned.
pub(crate) type Usable<'a> = &'a dyn Fn(&str) -> bool;

/// Sets the draw of a caption apart from the order's and the augmentation's numbers.
const CAPTION: u64 = 6;

impl Pick {
    fn of(self, count: usize) -> usize {
        match self {
            Pick::First => 0,
            Pick::Keyed { seed, position } => {
                KeyedRng::new(key(seed, &[CAPTION, position])).below(u32::try_from(count).unwrap_or(u32::MAX)) as usize
            }
        }
    }
}

/// A sample's members that may hold its caption.
pub(crate) struct CaptionMembers<'a> {
    pub(crate) text: Option<&'a [u8]>,
    pub(crate) json: Option<&'a [u8]>,
}

impl CaptionMembers<'_> {
    fn parsed(&self) -> Result<Value, SampleError> {
        parse(self.json.ok_or(SampleError::NoMember("json"))?)
    }
}

impl CaptionRule {
    /// Which members have to be read: text, JSON.
    pub(crate) fn needs(&self, has_text: bool) -> (bool, bool) {
        match self.source {
            CaptionSource::TextOr(_) => (has_text, !has_text),
            CaptionSource::Text => (true, false),
            CaptionSource::Json(_) | CaptionSource::Drawn { .. } | CaptionSource::Question(_) => (false, true),
        }
    }

    /// The caption before cleaning, inside its template; of several one that is usable, where there is one. So a list is
    /// good or bad whatever is drawn from it.
    pub(crate) fn caption(
        &self,
        members: &CaptionMembers,
        pick: Pick,
        usable: Usable<'_>,
    ) -> Result<String, SampleError> {
        Ok(self.in_template(self.find(members, pick, usable)?))
    }

    fn in_template(&self, caption: String) -> String {
        match &self.template {
            // An empty caption stays one: the template alone says nothing of the picture.
            Some(template) if !caption.trim().is_empty() => template.replacen("{}", caption.trim(), 1),
            _ => caption,
        }
    }

    /// The answers beside a question; of other captions none.
    pub(crate) fn answers(&self, members: &CaptionMembers) -> Result<Vec<String>, SampleError> {
        match &self.source {
            CaptionSource::Question(fields) => fields.answers(&members.parsed()?),
            _ => Ok(Vec::new()),
        }
    }

    fn find(&self, members: &CaptionMembers, pick: Pick, usable: Usable<'_>) -> Result<String, SampleError> {
        let text = || utf8(members.text.ok_or(SampleError::NoMember("txt"))?);
        let json = || members.parsed();
        match &self.source {
            CaptionSource::Text => text(),
            CaptionSource::TextOr(_) if members.text.is_some() => text(),
            CaptionSource::TextOr(field) | CaptionSource::Json(field) => {
                let value = json()?;
                let caption = field.find(&value).and_then(Value::as_str);
                caption.map(str::to_owned).ok_or_else(|| SampleError::CaptionField(field.0.clone()))
            }
            CaptionSource::Drawn { field, top } => {
                let value = json()?;
                let list = field.find(&value).and_then(Value::as_array);
                let list = list.ok_or_else(|| SampleError::CaptionList(field.0.clone()))?;
                let count = list.len().min(top.unwrap_or(usize::MAX));
                if count == 0 {
                    return Err(SampleError::CaptionEmpty);
                }
                let is_usable = |text: &&Value| text.as_str().is_some_and(|t| usable(&self.in_template(t.to_owned())));
                let good: Vec<&Value> = list[..count].iter().filter(is_usable).collect();
                let caption = match good.len() {
                    0 => &list[pick.of(count)],
                    of => good[pick.of(of)],
                };
                caption.as_str().map(str::to_owned).ok_or_else(|| SampleError::CaptionList(field.0.clone()))
            }
            CaptionSource::Question(fields) => fields.question(&json()?),
        }
    }
}

fn utf8(bytes: &[u8]) -> Result<String, SampleError> {
    let text = std::str::from_utf8(bytes).map_err(|error| SampleError::CaptionNotUtf8(error.valid_up_to()))?;
    Ok(text.to_owned())
}

pub(crate) fn parse(bytes: &[u8]) -> Result<Value, SampleError> {
    serde_json::from_str(&utf8(bytes)?).map_err(|error| SampleError::CaptionNotJson(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &[u8] = br#"{"caption": "a dog", "blip": {"texts": ["one", "two", "three"], "n": 3}, "x.y": "dotted"}"#;

    fn caption(source: CaptionSource, text: Option<&[u8]>, pick: Pick) -> Result<String, String> {
        let rule = CaptionRule { source, template: None };
        rule.caption(&CaptionMembers { text, json: Some(JSON) }, pick, &|_| true).map_err(|error| error.to_string())
    }

    fn drawn(field: &str, top: Option<usize>) -> CaptionSource {
        CaptionSource::Drawn { field: JsonPath::new(field), top }
    }

    #[test]
    fn a_caption_comes_from_where_the_rule_says() {
        let json = |path: &str| CaptionSource::Json(JsonPath::new(path));
        let or_caption = CaptionRule::default().source;
        assert_eq!(caption(or_caption.clone(), Some(b"a cat"), Pick::First).unwrap(), "a cat");
        assert_eq!(caption(or_caption, None, Pick::First).unwrap(), "a dog");
        assert_eq!(caption(CaptionSource::Text, None, Pick::First).unwrap_err(), "the sample has no .txt member");
        assert_eq!(caption(json("caption"), Some(b"a cat"), Pick::First).unwrap(), "a dog");
        assert_eq!(caption(json("x.y"), None, Pick::First).unwrap(), "dotted");
        assert_eq!(
            caption(json("blip.n"), None, Pick::First).unwrap_err(),
            "caption: the JSON has no text field \"blip.n\""
        );
    }

    #[test]
    fn one_of_the_first_captions_is_drawn_by_its_position() {
        let at = |top, position| caption(drawn("blip.texts", top), None, Pick::Keyed { seed: 7, position }).unwrap();
        let count = |top, word: &str| (0..300).filter(|&position| at(top, position) == word).count();
        assert_eq!(count(Some(2), "three"), 0);
        assert!((120..180).contains(&count(Some(2), "one")));
        assert!((70..130).contains(&count(None, "three")));
        // Never others: a run that goes on under a newer program draws them too.
        assert_eq!(
            [3, 4, 5, 6, 7, 8].map(|position| at(None, position)),
            ["two", "three", "three", "two", "three", "one"]
        );
        assert_eq!(caption(drawn("blip.texts", None), None, Pick::First).unwrap(), "one");
        let error = caption(drawn("caption", None), None, Pick::First).unwrap_err();
        assert_eq!(error, "caption: the JSON has no list of texts \"caption\"");
    }

    /// Else a picture would be lost for ever, on the rank that happened to draw its empty caption.
    #[test]
    fn what_is_drawn_is_usable_where_anything_is() {
        let usable = |text: &str| crate::text::says_something(text, crate::Clean::Blip);
        let draw = |list: &str, template: Option<&str>, pick| {
            let rule = CaptionRule { source: drawn("texts", None), template: template.map(str::to_owned) };
            let json = format!("{{\"texts\": {list}}}");
            rule.caption(&CaptionMembers { text: None, json: Some(json.as_bytes()) }, pick, &usable)
        };
        let at = |list, position| draw(list, None, Pick::Keyed { seed: 7, position }).unwrap();
        for position in 0..50 {
            // The good ones are drawn as if they stood alone.
            assert_eq!(at(r#"["", "one", "...", 7, "two", " "]"#, position), at(r#"["one", "two"]"#, position));
        }
        assert_eq!(draw(r#"["", "one"]"#, None, Pick::First).unwrap(), "one");
        assert_eq!(draw(r#"["", "..."]"#, None, Pick::First).unwrap(), "");
        assert_eq!(draw(r#"["", "..."]"#, Some("a photo of {}"), Pick::First).unwrap(), "a photo of ...");
    }

    #[test]
    fn a_template_stands_around_a_caption_that_is_there() {
        let rule = CaptionRule { template: Some("a photo of {}.".into()), ..CaptionRule::default() };
        let with = |text: &'static [u8]| {
            rule.caption(&CaptionMembers { text: Some(text), json: None }, Pick::First, &|_| true)
        };
        assert_eq!(with(b" a {} cat\n").unwrap(), "a photo of a {} cat.");
        assert_eq!(with(b"  ").unwrap(), "  ");
    }
}
