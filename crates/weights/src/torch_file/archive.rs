//! The present format (PyTorch 1.6 on): a zip archive with `NAME/data.pkl`, `NAME/data/KEY` and `NAME/byteorder`.

use std::collections::BTreeMap;

use super::contents::{Contents, check_pickle_size};
use super::machine;
use super::problem::TorchFileProblem;
use super::zip;

/// Reads the archive's pickle and the places of its storages.
pub(super) fn read(file: &[u8]) -> Result<Contents, TorchFileProblem> {
    let entries = zip::entries(file)?;
    let mut pickles = entries.keys().filter_map(|name| name.strip_suffix("/data.pkl")).filter(|top| !top.contains('/'));
    let top = match (pickles.next(), pickles.next()) {
        (Some(top), None) => top,
        (None, _) => return Err(TorchFileProblem::Archive { message: "it has no data.pkl".into() }),
        (Some(_), Some(_)) => return Err(TorchFileProblem::Archive { message: "it has two data.pkl".into() }),
    };
    let code = format!("{top}/code/");
    if entries.contains_key(&format!("{top}/constants.pkl")) || entries.keys().any(|name| name.starts_with(&code)) {
        return Err(TorchFileProblem::TorchScript);
    }
    if let Some(order) = entries.get(&format!("{top}/byteorder")) {
        let order = &file[order.clone()];
        if order != b"little" {
            let got = String::from_utf8_lossy(order).escape_debug().take(20).collect();
            return Err(TorchFileProblem::ByteOrder { got });
        }
    }
    let pickle = &file[entries[&format!("{top}/data.pkl")].clone()];
    check_pickle_size(pickle)?;
    let data = format!("{top}/data/");
    let storages = entries.iter().filter_map(|(name, range)| Some((name.strip_prefix(&data)?.into(), range.clone())));
    Ok(Contents { storages: storages.collect(), pickle: machine::read(pickle)?, numbered: BTreeMap::new() })
}
