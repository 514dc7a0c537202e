//! `train`: one stage after the other, each finished, continued or begun.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use blip2_torchx::device;
use blip2_weights::TOKENIZER_FILES;

use crate::assembly::blueprint::{Blueprint, VisionFiles};
use crate::assembly::language::LanguagePlan;
use crate::checkpoint::Checkpoint;
use crate::config::{Config, Precision, Stage};
use crate::data::check_shares;
use crate::data::index_lines::SetOpening;
use crate::data::sets::{open_held_out_set, open_training_sets};
use crate::error::{Error, Mistakes};
use crate::features::memory::MemoryCaches;
use crate::hub::Hub;
use crate::precision::slow_formats;
use crate::ranks::{Claims, Launch, Ranks, share, together};
use crate::run::Run;
use crate::run::folder::{Existing, RunFolder, host_name};
use crate::run::schedule::never_warm;
use crate::run::signals::StopSignal;
use crate::telemetry::Output;

/// What a run does about checkpoints that are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// Go on from the newest one that is whole.
    Auto,
    /// Refuse a folder that holds a run.
    Never,
    /// Go on from this one.
    Path(PathBuf),
}

/// What `train` is asked for.
pub struct TrainRequest {
    /// One file a stage, in order.
    pub configs: Vec<PathBuf>,
    /// `key.path=value` overrides of every file.
    pub sets: Vec<String>,
    /// What to do about checkpoints that are there.
    pub resume: Resume,
    /// Check everything and run one batch through, but write nothing.
    pub dry_run: bool,
    /// Where models come from that are named by a hub id.
    pub hub: Hub,
    /// Where `data.shard_cache.dir: auto` is.
    pub shard_cache: Option<PathBuf>,
    /// Makes the display of a stage's progress.
    pub output: fn() -> Output,
    /// Takes lines that are no progress.
    pub say: fn(&str),
    /// The other processes, where a launcher started several.
    pub launch: Option<Launch>,
    /// Ends the process with a message: it hangs on another rank that is lost.
    pub abandon: fn(&str),
    /// The commit the program was built from, where known.
    pub git_commit: Option<String>,
}

impl TrainRequest {
    /// What is done about a run that is in a folder already.
    pub(crate) fn existing(&self) -> Existing {
        if self.resume == Resume::Never { Existing::Refuse } else { Existing::Continue }
    }
}

/// How `train` ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finished {
    /// Every stage is done.
    Done,
    /// A signal stopped it after a checkpoint; the same command goes on.
    Interrupted {
        /// The stage's folder.
        folder: PathBuf,
        /// Steps done.
        step: u64,
    },
}

/// Trains every stage in turn; stages that are finished are skipped.
///
/// # Errors
/// Every mistake of every file at once; then whatever stops a stage, on whatever rank.
pub fn run(request: &TrainRequest) -> Result<Finished, Error> {
    together(request.launch.as_ref(), request.abandon, |ranks| stages(request, ranks))
}

fn stages(request: &TrainRequest, ranks: &Rc<dyn Ranks>) -> Result<Finished, Error> {
    let mut configs = Config::load_all(&request.configs, &request.sets)?;
    same_start(&configs, request, &**ranks)?;
    if matches!(request.resume, Resume::Path(_)) && configs.len() > 1 {
        return Err(Error::Mismatch(
            "--resume PATH: expected a single --config, since a checkpoint belongs to one stage".into(),
        ));
    }
    let mut caches = MemoryCaches::default();
    request.hub.keep_alive(ranks.pulse());
    let stop = StopSignal::listen(request.launch.is_some()).map_err(|e| Error::file("signals", e))?;
    let say = |line: &str| {
        if ranks.is_first() {
            (request.say)(line);
        }
    };
    // A dry run comes to every stage anyway.
    if !request.dry_run {
        for place in 1..configs.len() {
            look_ahead(&configs[place], &configs[..place], request, &**ranks)?;
        }
    }
    let stages = configs.len();
    let mut unfinished: Vec<Config> = Vec::new();
    for (place, config) in configs.iter_mut().enumerate() {
        let folder = config.run_folder();
        let finished = is_finished(config, request)?;
        if ranks.share_numbers(&[u64::from(finished)])?[0][0] == 1 {
            say(&format!("{}: finished already, {} steps", folder.display(), config.schedule.steps));
            continue;
        }
        ranks.enter(0, "fetching models");
        request.hub.resolve(config)?;
        if request.dry_run {
            say(&dry_run(config, request, &unfinished, &**ranks, &say)?);
            unfinished.push(config.clone());
            continue;
        }
        let (blueprint, device) = checked(config, request, &**ranks, &say)?;
        let mut run = Run::open(config, blueprint, request, Rc::clone(ranks), device, &mut caches)?;
        let (step, finished) = stop.holding(|| run.train(&stop))?;
        // A signal in a stage's last step: the next one is not begun.
        if !finished || (place + 1 < stages && ranks.any(stop.is_set())?) {
            return Ok(Finished::Interrupted { folder, step });
        }
    }
    Ok(Finished::Done)
}

/// Checks all that can be checked of a stage, and tries one batch where the stages before it that are `unfinished` need not be run first.
fn dry_run(
    config: &Config,
    request: &TrainRequest,
    unfinished: &[Config],
    ranks: &dyn Ranks,
    say: &dyn Fn(&str),
) -> Result<String, Error> {
    RunFolder::check(config, request.existing())?;
    if let Resume::Path(path) = &request.resume {
        Checkpoint::open(path)?;
    }
    // Where indices go of shards that have none.
    let scratch = tempfile::tempdir().map_err(|error| Error::file(std::env::temp_dir(), error))?;
    let mut elsewhere = config.clone();
    elsewhere.run.dir = scratch.path().to_owned();
    let (folder, init) = (config.run_folder(), &config.model.qformer.init);
    let earlier = begins_from(config, unfinished);
    if earlier.is_none() {
        let (blueprint, device) = checked(config, request, ranks, say)?;
        return Ok(format!("{}: {}", folder.display(), Run::try_one_batch(&elsewhere, blueprint, device, ranks)?));
    }
    check_without_init(config, earlier, ranks)?;
    let opening = SetOpening { say: None, dry_run: true };
    open_training_sets(&elsewhere, opening, &ranks.pulse())?;
    open_held_out_set(&elsewhere, opening, &ranks.pulse())?;
    let (folder, init) = (folder.display(), init.display());
    Ok(format!("{folder}: config, frozen towers and data are good; {init} will be made by the stage before"))
}

/// Which of these stages makes the Q-Former that this one begins from.
fn begins_from<'a>(config: &Config, before: &'a [Config]) -> Option<&'a Config> {
    before.iter().find(|earlier| config.begins_from(&earlier.run_folder()))
}

/// What holds of a stage whatever its Q-Former will be: the ranks' shares of its batches, its frozen towers, and that its features are as wide as
/// those that the Q-Former of the `earlier` stage is trained on.
fn check_without_init(config: &Config, earlier: Option<&Config>, ranks: &dyn Ranks) -> Result<(), Error> {
    let mut wrong = Mistakes::default();
    wrong.take(check_shares(config, ranks.world()));
    let here = wrong.take(VisionFiles::open(config));
    // What is wrong with the earlier stage's files is told with that stage.
    let there = earlier.and_then(|earlier| VisionFiles::open(earlier).ok());
    if let (Some(here), Some(there)) = (here, there)
        && here.width() != there.width()
    {
        let expected =
            format!("an image encoder with features {} wide, as the stage before trains behind", there.width());
        wrong.take::<()>(Err(Error::key("model.vision.weights", expected, here.width(), "")));
    }
    if config.task.stage == Stage::Two {
        wrong.take(LanguagePlan::open(config));
    }
    wrong.into_result()
}

/// Whether a stage need not be run, once its configuration names what this machine has of it.
fn is_finished(config: &mut Config, request: &TrainRequest) -> Result<bool, Error> {
    request.hub.keep_commits(config);
    config.data.shard_cache.resolve_dir(request.shard_cache.as_deref());
    Ok(request.resume == Resume::Auto && RunFolder::is_finished(config)?)
}

/// What would stop a later stage only when those before it are done: its folder, and all that has nothing to do with them.
fn look_ahead(config: &Config, before: &[Config], request: &TrainRequest, ranks: &dyn Ranks) -> Result<(), Error> {
    let mut config = config.clone();
    if is_finished(&mut config, request)? {
        return Ok(());
    }
    RunFolder::check(&config, request.existing())?;
    request.hub.resolve(&mut config)?;
    let mut earlier = begins_from(&config, before).cloned();
    earlier.iter_mut().try_for_each(|earlier| request.hub.resolve_towers(earlier))?;
    check_without_init(&config, earlier.as_ref(), ranks)
}

/// The stage's parts, compared with their files before a device is touched, and its device; `say` hears what is worth a warning.
fn checked(
    config: &Config,
    request: &TrainRequest,
    ranks: &dyn Ranks,
    say: &dyn Fn(&str),
) -> Result<(Blueprint, tch::Device), Error> {
    let mut wrong = Mistakes::default();
    let shares = wrong.take(check_shares(config, ranks.world()));
    let blueprint = wrong.take(Blueprint::open(config));
    let (Some(()), Some(blueprint)) = (shares, blueprint) else { return Err(wrong.into_error()) };
    same_files(config, &blueprint, ranks)?;
    for rejected in &blueprint.init.rejected {
        let path = rejected.path.display();
        say(&format!("warning: model.qformer.init: {path} is damaged, an older one is taken: {}", rejected.reason));
    }
    blueprint.init.unfinished().iter().for_each(|line| say(line));
    blueprint.init.begins_anew(config.task.stage)?.iter().for_each(|line| say(line));
    let device = device_of(config, request.launch.as_ref(), ranks)?;
    slow_formats(config, device).into_iter().chain(never_warm(config)).for_each(|line| say(&line));
    if config.run.precision == Precision::Fp16 && device == tch::Device::Cpu {
        let expected = "fp32 | bf16 on the processor, which run.device: auto came to";
        return Err(Error::key("run.precision", expected, "fp16", "name a GPU in run.device, or set bf16"));
    }
    Ok((blueprint, device))
}

/// Every rank was started with the same program and the same configuration.
fn same_start(configs: &[Config], request: &TrainRequest, ranks: &dyn Ranks) -> Result<(), Error> {
    if ranks.world() == 1 {
        return Ok(());
    }
    let mut claims = Claims::default();
    claims.claim_program(request.git_commit.as_deref())?;
    let resume = match &request.resume {
        Resume::Auto => "auto".to_owned(),
        Resume::Never => "never".to_owned(),
        Resume::Path(path) => path.display().to_string(),
    };
    claims.claim("--config files", configs.len().to_string());
    claims.claim("--dry-run", request.dry_run.to_string());
    claims.claim("--resume", resume);
    for (place, config) in configs.iter().enumerate() {
        let of_stage = if configs.len() > 1 { format!(" of configuration {}", place + 1) } else { String::new() };
        // Each rank may be given a device of its own.
        for (key, value) in config.settings().into_iter().filter(|(key, _)| key != "run.device") {
            claims.claim(format!("{key}{of_stage}"), value);
        }
    }
    claims.compare(ranks)
}

/// What the model's files say beside its weights, which are compared when they are loaded.
fn same_files(config: &Config, blueprint: &Blueprint, ranks: &dyn Ranks) -> Result<(), Error> {
    if ranks.world() == 1 {
        return Ok(());
    }
    let digest = |bytes: &[u8]| blake3::hash(bytes).to_hex()[..16].to_owned();
    let mut claims = Claims::default();
    claims.claim("config.json of the model's parts", digest(blueprint.model_json.to_string().as_bytes()));
    claims.claim("preprocessing of pictures", format!("{:?}", blueprint.preprocessing));
    let language = config.model.language.as_ref().map(|language| &*language.weights);
    let tokenizer: &Path = language.map_or(&blueprint.init.tokenizer, |folder| folder);
    for name in TOKENIZER_FILES {
        if let Ok(bytes) = fs::read(tokenizer.join(name)) {
            claims.claim(name, digest(&bytes));
        }
    }
    claims.compare(ranks)
}

/// The device that `run.device` names, of one kind on all ranks, through which they exchange from now on.
fn device_of(config: &Config, launch: Option<&Launch>, ranks: &dyn Ranks) -> Result<tch::Device, Error> {
    config.run.precision.set_tf32();
    let local_rank = launch.map_or(0, |launch| launch.local_rank);
    let device = device::select_for(config.run.device, local_rank);
    let kind = match &device {
        Ok(tch::Device::Cpu) => "cpu",
        Ok(_) => "a GPU",
        Err(_) => "no GPU",
    };
    let mut claims = Claims::default();
    claims.claim("run.device", kind);
    claims.compare(ranks)?;
    let device = device?;
    one_gpu_each(device, ranks)?;
    ranks.exchange_on(device)?;
    Ok(device)
}

/// Ranks on one GPU would only wait for each other: NCCL refuses them, with words that name neither.
///
/// They are told apart by what the driver calls the GPU. Where each rank sees its own GPU alone, as in a container or under a launcher that hides the
/// others, all have the number 0 on one host, and are none the less on different ones.
fn one_gpu_each(device: tch::Device, ranks: &dyn Ranks) -> Result<(), Error> {
    if device == tch::Device::Cpu {
        return Ok(());
    }
    let own = (device::uuid(device), format!("{device:?} on {}", host_name()));
    let twice = on_one_gpu(&share(ranks, &own)?);
    if twice.is_empty() {
        return Ok(());
    }
    let advice = "start no more ranks on a host than it has GPUs, and set run.device=cuda without a number";
    Err(Error::key("run.device", "a GPU of its own for each rank", twice.join("; "), advice))
}

/// The ranks that share a GPU with others, by each such GPU.
fn on_one_gpu(gpus: &[(Option<String>, String)]) -> Vec<String> {
    let mut ranks_of: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (rank, (uuid, _)) in gpus.iter().enumerate() {
        uuid.iter().for_each(|uuid| ranks_of.entry(uuid).or_default().push(rank));
    }
    let line = |ranks: Vec<usize>| {
        let numbers: Vec<String> = ranks.iter().map(ToString::to_string).collect();
        format!("one for ranks {} ({})", numbers.join(", "), gpus[ranks[0]].1)
    };
    ranks_of.into_values().filter(|ranks| ranks.len() > 1).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_share_a_gpu_are_named() {
        let gpu = |uuid: Option<&str>| (uuid.map(str::to_owned), "Cuda(0) on a".to_owned());
        let two_each = [gpu(Some("x")), gpu(Some("y")), gpu(Some("x")), gpu(Some("y"))];
        assert_eq!(on_one_gpu(&two_each), ["one for ranks 0, 2 (Cuda(0) on a)", "one for ranks 1, 3 (Cuda(0) on a)"]);
        // Nothing is known of those that the driver does not tell apart, as on processors.
        assert!(on_one_gpu(&[gpu(Some("x")), gpu(Some("y")), gpu(None), gpu(None)]).is_empty());
    }
}
