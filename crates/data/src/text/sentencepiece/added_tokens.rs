//! Tokens beside the vocabulary's own rules: what the files name as special or added, and the ids that they get.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::family::{Family, Options, SAVE_ONCE, extra_id};
use super::model_file::Piece;
use crate::text::TextError;
use crate::text::tokenizer_folder::read_object;

/// The roles in the order in which `transformers` adds their tokens.
const ROLES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
const ADDITIONAL: &str = "additional_special_tokens";

/// A token that is found in texts before anything else.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Token {
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    /// Whether it is looked for in the normalised text; by default, if it is not special.
    normalized: Option<bool>,
    special: bool,
}

impl Token {
    fn special(content: &str) -> Token {
        let content = content.to_owned();
        Token { content, single_word: false, lstrip: false, rstrip: false, normalized: None, special: true }
    }

    /// A token with its options, as files have it.
    fn with_options(token: &Map<String, Value>) -> Option<Token> {
        let flag = |key: &str| token.get(key).and_then(Value::as_bool);
        Some(Token {
            content: token.get("content")?.as_str().filter(|content| !content.is_empty())?.to_owned(),
            single_word: flag("single_word").unwrap_or(false),
            lstrip: flag("lstrip").unwrap_or(false),
            rstrip: flag("rstrip").unwrap_or(false),
            normalized: flag("normalized"),
            special: flag("special").unwrap_or(false),
        })
    }
}

/// A special token, and whether a file has its name alone, so that options which it has elsewhere count.
struct Special {
    token: Token,
    name_alone: bool,
}

/// What the files of a folder say of special and added tokens.
pub(super) struct Named {
    roles: HashMap<&'static str, String>,
    special: Vec<Special>,
    /// Added tokens by id, and the file that has them.
    added: BTreeMap<u32, Token>,
    added_in: PathBuf,
    /// Whether the added tokens' options are those of the special tokens among them, too.
    complete: bool,
}

impl Named {
    /// Reads them as `transformers` does: where `tokenizer_config.json` has `added_tokens_decoder`, it alone counts, else `special_tokens_map.json` goes
    /// before it, and `added_tokens.json` has the added tokens.
    ///
    /// # Errors
    /// Files that do not parse or do not have what they should.
    pub(super) fn read(
        folder: &Path,
        config: &Map<String, Value>,
        family: Family,
        options: &Options,
    ) -> Result<Named, TextError> {
        let config_path = folder.join("tokenizer_config.json");
        let complete = config.contains_key("added_tokens_decoder");
        let map_path = folder.join("special_tokens_map.json");
        let map = if complete { Map::new() } else { read_object(folder, "special_tokens_map.json")? };

        let mut named = Named {
            roles: HashMap::new(),
            special: Vec::new(),
            added: BTreeMap::new(),
            added_in: config_path.clone(),
            complete,
        };
        let mut in_files = HashSet::new();
        for role in ROLES {
            let given = map.get(role).map(|value| (value, &map_path));
            let given = given.or(config.get(role).map(|value| (value, &config_path)));
            let (token, name_alone) = match given {
                None => match family.default_token(role) {
                    Some(default) => (Token::special(default), true),
                    None => continue,
                },
                Some((Value::Null, _)) => continue,
                Some((value, path)) => special_token(value).ok_or_else(|| unexpected(path, role, value))?,
            };
            if given.is_some() {
                in_files.insert(token.content.clone());
            }
            named.roles.insert(role, token.content.clone());
            named.special.push(Special { token, name_alone: name_alone && !family.gives_options(role) });
        }
        let mut additional: Vec<Special> = Vec::new();
        for (object, path) in [(config, &config_path), (&map, &map_path)] {
            for value in list(object, ADDITIONAL, path)? {
                let (token, name_alone) = special_token(value).ok_or_else(|| unexpected(path, ADDITIONAL, value))?;
                in_files.insert(token.content.clone());
                if !additional.iter().any(|other| other.token.content == token.content) {
                    additional.push(Special { token, name_alone });
                }
            }
        }
        if family == Family::T5 {
            complete_extra_ids(&mut additional, options.extra_ids)
                .map_err(|reason| TextError::Load { path: config_path.clone(), reason })?;
        }
        named.special.append(&mut additional);
        if let Some(Value::Object(extra)) = config.get("extra_special_tokens") {
            for (role, value) in extra {
                let (token, name_alone) = special_token(value).ok_or_else(|| unexpected(&config_path, role, value))?;
                named.special.push(Special { token, name_alone });
            }
        }
        named.read_added(folder, config, &in_files)?;
        Ok(named)
    }

    fn read_added(
        &mut self,
        folder: &Path,
        config: &Map<String, Value>,
        special: &HashSet<String>,
    ) -> Result<(), TextError> {
        match config.get("added_tokens_decoder") {
            Some(Value::Object(tokens)) => {
                for (key, value) in tokens {
                    let token = value.as_object().and_then(Token::with_options);
                    let (Ok(id), Some(token)) = (key.parse(), token) else {
                        let wrong = json!({key.as_str(): value});
                        return Err(unexpected(&self.added_in, "added_tokens_decoder", &wrong));
                    };
                    self.added.insert(id, token);
                }
            }
            Some(other) => return Err(unexpected(&self.added_in, "added_tokens_decoder", other)),
            None => {
                self.added_in = folder.join("added_tokens.json");
                for (content, value) in read_object(folder, "added_tokens.json")? {
                    let Some(id) = value.as_u64().and_then(|id| u32::try_from(id).ok()) else {
                        return Err(unexpected(&self.added_in, &content, &value));
                    };
                    let special = special.contains(&content);
                    let token = Token { normalized: Some(!special), special, ..Token::special(&content) };
                    self.added.insert(id, token);
                }
            }
        }
        Ok(())
    }

    /// The name of a role's token.
    pub(super) fn role(&self, role: &str) -> Option<&str> {
        self.roles.get(role).map(String::as_str)
    }

    /// All tokens beside the rules of the vocabulary `ids`, with ids behind it where they are not in it: the model's symbols, the added tokens, the
    /// special tokens.
    ///
    /// # Errors
    /// An added token that would get another id than the file says.
    pub(super) fn all(
        &self,
        ids: &HashMap<&str, usize>,
        pieces: &[Piece],
        family: Family,
    ) -> Result<AddedTokens, TextError> {
        let mut all =
            AddedTokens { behind: ids.len() as u32, by_id: BTreeMap::new(), ids: HashMap::new(), seen: HashSet::new() };
        for piece in pieces.iter().filter(|piece| piece.control || piece.user_defined) {
            let special = piece.control || family.calls_special(&piece.text);
            all.add(ids, Token { normalized: Some(false), special, ..Token::special(&piece.text) });
        }
        let names: HashSet<&str> = self.special.iter().map(|special| special.token.content.as_str()).collect();
        let listed: HashSet<&str> = self.added.values().map(|token| token.content.as_str()).collect();
        for (&id, token) in &self.added {
            let content = token.content.as_str();
            let got = all.add(ids, Token { special: token.special || names.contains(content), ..token.clone() });
            if got != id {
                let reason = format!(
                    "{content:?}: expected the id {got}, its own or the next one in the vocabulary of {} tokens, got {id}; {SAVE_ONCE}",
                    ids.len()
                );
                return Err(TextError::Load { path: self.added_in.clone(), reason });
            }
        }
        let mut done = HashSet::new();
        for Special { token, name_alone } in &self.special {
            let content = token.content.as_str();
            let known = if *name_alone { all.id(content).is_some() } else { self.complete && listed.contains(content) };
            if done.insert(content) && !known {
                all.add(ids, token.clone());
            }
        }
        Ok(all)
    }
}

/// The tokens beside the vocabulary's rules with their ids.
pub(super) struct AddedTokens {
    /// The first id behind the vocabulary.
    behind: u32,
    by_id: BTreeMap<u32, Token>,
    ids: HashMap<String, u32>,
    /// All that were added, those with other options under the same name too.
    seen: HashSet<Token>,
}

impl AddedTokens {
    /// As the tokenizers library adds one: under its id in the vocabulary, else under the next. Options given later count, unless they were given before.
    fn add(&mut self, vocabulary: &HashMap<&str, usize>, token: Token) -> u32 {
        let token = Token { normalized: Some(token.normalized.unwrap_or(!token.special)), ..token };
        let next = self.by_id.keys().next_back().map_or(self.behind, |last| self.behind.max(last + 1));
        let known = self.ids.get(&token.content).copied();
        let known = known.or(vocabulary.get(token.content.as_str()).map(|&id| id as u32));
        let id = known.unwrap_or(next);
        if self.seen.insert(token.clone()) {
            self.ids.insert(token.content.clone(), id);
            self.by_id.insert(id, token);
        }
        id
    }

    /// The id of an added token.
    pub(super) fn id(&self, content: &str) -> Option<u32> {
        self.ids.get(content).copied()
    }

    /// As `tokenizer.json` has them.
    pub(super) fn json(&self) -> Value {
        let tokens = self.by_id.iter().map(|(id, token)| {
            let Token { content, single_word, lstrip, rstrip, normalized, special } = token;
            json!({
                "id": id, "content": content, "single_word": single_word, "lstrip": lstrip, "rstrip": rstrip,
                "normalized": normalized, "special": special,
            })
        });
        tokens.collect()
    }
}

/// A role's value and whether it is a name alone.
fn special_token(value: &Value) -> Option<(Token, bool)> {
    match value {
        Value::String(name) if !name.is_empty() => Some((Token::special(name), true)),
        Value::Object(token) => Some((Token { special: true, ..Token::with_options(token)? }, false)),
        _ => None,
    }
}

fn list<'a>(object: &'a Map<String, Value>, key: &str, path: &Path) -> Result<&'a [Value], TextError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(values)) => Ok(values),
        Some(other) => Err(unexpected(path, key, other)),
    }
}

/// T5's sentinels are special tokens, which the files name all or none of.
fn complete_extra_ids(additional: &mut Vec<Special>, extra_ids: usize) -> Result<(), String> {
    let named = additional.iter().filter(|special| special.token.content.contains("<extra_id_")).count();
    if named > 0 && extra_ids > 0 && named != extra_ids {
        return Err(format!("{ADDITIONAL}: expected none or all of {extra_ids} extra_ids, got {named}"));
    }
    if named == 0 {
        additional.extend((0..extra_ids).map(|i| Special { token: Token::special(&extra_id(i)), name_alone: true }));
    }
    Ok(())
}

fn unexpected(path: &Path, key: &str, value: &Value) -> TextError {
    let mut got: String = value.to_string().chars().take(200).collect();
    if got.len() < value.to_string().len() {
        got.push_str("...");
    }
    let reason = format!("{key}: expected tokens as transformers writes them, got {got}; {SAVE_ONCE}");
    TextError::Load { path: path.to_owned(), reason }
}
