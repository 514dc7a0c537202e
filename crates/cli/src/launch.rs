//! What torchrun, SLURM and Kubernetes' PyTorchJob say in the environment about the processes that they start together.
//!
//! ```text
//!                torchrun, PyTorchJob        srun
//! rank           RANK                        SLURM_PROCID
//! world          WORLD_SIZE                  SLURM_NTASKS
//! local rank     LOCAL_RANK, else 0          SLURM_LOCALID, else 0
//! host           MASTER_ADDR                 MASTER_ADDR, else the first of SLURM_STEP_NODELIST
//! port           MASTER_PORT                 MASTER_PORT, else made of SLURM_JOB_ID
//! ```

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use blip2_trainer::ranks::{Launch, Meeting};

/// More processes than any launch has.
const MAX_WORLD: u64 = 1 << 16;
/// As PyTorch waits.
const PATIENCE_S: u64 = 300;
const HANG_S: u64 = 600;
/// From this number on steps are none of several processes: the shell of `salloc`, the script of `sbatch`.
const FIRST_SPECIAL_STEP: u64 = 0xFFFF_FFF0;
/// Ports made of a job's number are from here on, below those that systems give away by themselves.
const SLURM_FIRST_PORT: u64 = 10_000;
const SLURM_PORTS: u64 = 20_000;

/// How this process was started among others; `None` where it is alone.
///
/// # Errors
/// Variables that are no numbers, missing or contradict each other, all of them in one message.
pub(crate) fn launch() -> Result<Option<Launch>> {
    read(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
}

/// Whether a launcher started this process, be it the only one: it then goes by the exit code whether there is more to do.
pub(crate) fn is_launched() -> bool {
    let variables = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    variables("RANK").is_some() || is_step(&variables)
}

/// Whether this process is one of a step that `srun` started. A shell inside an allocation has SLURM's variables, but no such step.
fn is_step(variables: Variables) -> bool {
    variables("SLURM_STEP_ID").and_then(|step| step.parse().ok()).is_some_and(|step: u64| step < FIRST_SPECIAL_STEP)
}

/// Refuses to do once for every process what is one process' work.
///
/// # Errors
/// Where a launcher has started several of them.
pub(crate) fn alone(command: &str) -> Result<()> {
    match launch()? {
        Some(launch) if launch.world > 1 => bail!(
            "{command} is the work of one process, and a launcher has started {}; start it without, or let train do it, which shares it out",
            launch.world
        ),
        _ => Ok(()),
    }
}

/// The path with `{rank}` replaced by the rank.
pub(crate) fn path_of_rank(path: &Path, rank: usize) -> PathBuf {
    match path.to_str() {
        Some(text) => PathBuf::from(text.replace("{rank}", &rank.to_string())),
        None => path.to_path_buf(),
    }
}

type Variables<'a> = &'a dyn Fn(&str) -> Option<String>;

fn read(variables: Variables) -> Result<Option<Launch>> {
    let mut problems = Vec::new();
    let mut number = |name: &str| {
        let value = variables(name)?;
        let parsed = value.parse::<u64>().ok();
        if parsed.is_none() {
            problems.push(format!("{name}: expected a number, got {value:?}"));
        }
        parsed
    };
    let slurm = variables("RANK").is_none() && variables("WORLD_SIZE").is_none() && is_step(variables);
    let names =
        if slurm { ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"] } else { ["RANK", "WORLD_SIZE", "LOCAL_RANK"] };
    let [rank, world, local_rank] = names.map(&mut number);
    let local_world = if slurm { None } else { number("LOCAL_WORLD_SIZE") };
    let port = number("MASTER_PORT");
    let job = if slurm { number("SLURM_JOB_ID") } else { None };
    let patience = number("BLIP2_JOIN_TIMEOUT_S").unwrap_or(PATIENCE_S);
    let hang = number("BLIP2_HANG_TIMEOUT_S").unwrap_or(HANG_S);
    // A group of one does by itself what many do together: to try a machine's communication.
    let alone_in_group = variables("BLIP2_GROUP_OF_ONE").as_deref() == Some("1");
    let (rank, world) = match (rank, world) {
        _ if !problems.is_empty() => bail!("{}", problems.join("\n")),
        (None, None) => return Ok(None),
        (None | Some(0), Some(1)) if !alone_in_group => return Ok(None),
        (Some(rank), Some(world)) => (rank, world),
        (None, Some(_)) => bail!("{}: expected this process' number, as {} is set, got nothing", names[0], names[1]),
        (Some(_), None) => bail!("{}: expected the number of processes, as {} is set, got nothing", names[1], names[0]),
    };
    if !(1..=MAX_WORLD).contains(&world) {
        problems.push(format!("{}: expected 1 to {MAX_WORLD}, got {world}", names[1]));
    } else if rank >= world {
        problems.push(format!("{}: expected a number below {} ({world}), got {rank}", names[0], names[1]));
    }
    if let (Some(local_rank), Some(local_world)) = (local_rank, local_world)
        && local_rank >= local_world
    {
        problems
            .push(format!("LOCAL_RANK: expected a number below LOCAL_WORLD_SIZE ({local_world}), got {local_rank}"));
    }
    let host = variables("MASTER_ADDR").or_else(|| if slurm { first_node(variables) } else { None });
    let port = port.or(job.map(|job| SLURM_FIRST_PORT + job % SLURM_PORTS));
    if host.is_none() {
        problems
            .push("MASTER_ADDR: expected the host of rank 0, got nothing; a launcher such as torchrun sets it".into());
    }
    let port = match port.map(u16::try_from) {
        Some(Ok(0)) => {
            problems.push("MASTER_PORT: expected a port that all ranks know, got 0".into());
            0
        }
        Some(Ok(port)) => port,
        Some(Err(_)) => {
            problems.push("MASTER_PORT: expected a port below 65536".into());
            0
        }
        None => {
            problems.push(
                "MASTER_PORT: expected a free port of that host, got nothing; a launcher such as torchrun sets it"
                    .into(),
            );
            0
        }
    };
    let Some(host) = host.filter(|_| problems.is_empty()) else { bail!("{}", problems.join("\n")) };
    // Nothing that may differ between ranks: torchrun's count of restarts does on several hosts, and SLURM's numbers do where a torchrun was
    // started on each host by an srun of its own, or by ssh.
    let job: &[&str] = if slurm { &["SLURM_JOB_ID", "SLURM_STEP_ID"] } else { &["TORCHELASTIC_RUN_ID"] };
    let job: Vec<String> = job.iter().filter_map(|name| variables(name)).chain([world.to_string()]).collect();
    Ok(Some(Launch {
        rank: rank as usize,
        world: world as usize,
        local_rank: local_rank.unwrap_or(0) as usize,
        meeting: Meeting {
            host,
            port,
            served: variables("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True"),
            job: job.join("-"),
            patience: Duration::from_secs(patience),
        },
        hang: Duration::from_secs(hang),
    }))
}

/// The first host of a list as SLURM writes it: `a,b`, `node[3-5,9]`, `node[03-05]-ib`.
fn first_node(variables: Variables) -> Option<String> {
    let list = variables("SLURM_STEP_NODELIST").or_else(|| variables("SLURM_JOB_NODELIST"))?;
    let Some((prefix, rest)) = list.split_once('[').filter(|(prefix, _)| !prefix.contains(',')) else {
        return list.split(',').next().map(str::to_owned);
    };
    let (numbers, rest) = rest.split_once(']')?;
    let first = numbers.split([',', '-']).next()?;
    let suffix = rest.split(',').next().unwrap_or_default();
    Some(format!("{prefix}{first}{suffix}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Result<Option<Launch>> {
        read(&|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string()))
    }

    fn error(pairs: &[(&str, &str)]) -> String {
        of(pairs).unwrap_err().to_string()
    }

    #[test]
    fn every_rank_has_its_own_file() {
        assert_eq!(path_of_rank(Path::new("a/batch.rank{rank}.st"), 3), Path::new("a/batch.rank3.st"));
        assert_eq!(path_of_rank(Path::new("a/batch.st"), 3), Path::new("a/batch.st"));
    }

    #[test]
    fn one_process_is_alone_whoever_started_it() {
        assert_eq!(of(&[]).unwrap(), None);
        assert_eq!(of(&[("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "a")]).unwrap(), None);
        let group = [("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "1")];
        assert_eq!(of(&[&group[..], &[("BLIP2_GROUP_OF_ONE", "1")]].concat()).unwrap().unwrap().world, 1);
        // A shell in an allocation; where SLURM makes it a step (use_interactive_step), a step of a number of its own.
        let shell = [("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0"), ("SLURM_NODELIST", "a,b")];
        assert_eq!(of(&shell).unwrap(), None);
        for step in ["4294967290", "4294967291", "none"] {
            assert_eq!(of(&[&shell[..], &[("SLURM_STEP_ID", step)]].concat()).unwrap(), None, "{step}");
        }
    }

    #[test]
    fn torchrun_serves_the_store_and_a_plain_launcher_does_not() {
        let plain = [("RANK", "1"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "29500")];
        let launch = of(&plain).unwrap().unwrap();
        assert_eq!((launch.rank, launch.world, launch.local_rank), (1, 4, 0));
        assert_eq!((launch.meeting.host.as_str(), launch.meeting.port, launch.meeting.served), ("a", 29500, false));
        let agent =
            [("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_RESTART_COUNT", "2"), ("LOCAL_RANK", "3")];
        let torchrun = of(&[&plain[..], &agent].concat()).unwrap().unwrap();
        assert_eq!(torchrun.local_rank, 3);
        // Each host's agent counts for itself.
        assert!(torchrun.meeting.served && torchrun.meeting.job == launch.meeting.job);
    }

    #[test]
    fn torchruns_of_several_steps_meet() {
        let rank = [("RANK", "1"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "29500")];
        let job = |more: &[(&'static str, &'static str)]| {
            of(&[&rank[..], &[("TORCHELASTIC_RUN_ID", "mine")], more].concat()).unwrap().unwrap().meeting.job
        };
        let step = |step| job(&[("SLURM_JOB_ID", "7"), ("SLURM_STEP_ID", step)]);
        assert_eq!(step("0"), step("1"));
        assert_eq!(step("0"), job(&[]));
    }

    #[test]
    fn slurm_names_the_host_and_its_job_the_port() {
        let step = |nodes| {
            let step = [("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "3"), ("SLURM_NTASKS", "8"), ("SLURM_LOCALID", "1")];
            of(&[&step[..], &[("SLURM_JOB_ID", "123456"), ("SLURM_STEP_NODELIST", nodes)]].concat()).unwrap().unwrap()
        };
        for (nodes, first) in
            [("a", "a"), ("a,b", "a"), ("n[03-05,9],x", "n03"), ("n[7]-ib,m", "n7-ib"), ("a,n[1-2]", "a")]
        {
            let launch = step(nodes);
            assert_eq!((launch.rank, launch.world, launch.meeting.host.as_str()), (3, 8, first), "{nodes}");
            assert_eq!(launch.local_rank, 1);
            assert_eq!(u64::from(launch.meeting.port), 10_000 + 123_456 % 20_000);
        }
    }

    #[test]
    fn all_that_is_wrong_is_said_at_once() {
        assert_eq!(
            error(&[("RANK", "one"), ("WORLD_SIZE", "two")]),
            "RANK: expected a number, got \"one\"\nWORLD_SIZE: expected a number, got \"two\""
        );
        assert!(error(&[("WORLD_SIZE", "2")]).starts_with("RANK: expected this process' number"));
        assert!(error(&[("RANK", "1")]).starts_with("WORLD_SIZE: expected the number of processes"));
        let text = error(&[("RANK", "2"), ("WORLD_SIZE", "2")]);
        for part in
            ["RANK: expected a number below WORLD_SIZE (2), got 2", "MASTER_ADDR: expected", "MASTER_PORT: expected"]
        {
            assert!(text.contains(part), "{text}");
        }
        let port = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "70000")];
        assert_eq!(error(&port), "MASTER_PORT: expected a port below 65536");
    }
}
