//! Replication commands: PostgreSQL's and Neon's, parsed.
//!
//! ```text
//! IDENTIFY_SYSTEM
//! SHOW name[.name...]
//! TIMELINE_HISTORY tli
//! READ_REPLICATION_SLOT name
//! CREATE_REPLICATION_SLOT name [TEMPORARY] PHYSICAL [ ( RESERVE_WAL [bool] ) | RESERVE_WAL ]
//! DROP_REPLICATION_SLOT name [WAIT]
//! START_REPLICATION [SLOT name] [PHYSICAL] X/X [TIMELINE tli] [ ( term = 'N' ) ]
//! START_WAL_PUSH [ ( proto_version 'N', allow_timeline_creation 'bool', stock '1', primary_timeline 'N' | sync 'bool' ) ]
//! TIMELINE_FENCE [ ( pg_timeline 'N' [, term 'N'] | clear 'bool' ) ]
//! TIMELINE_STATUS
//! TIMELINE_MEMBERS
//! PEER_EXCHANGE 'json'
//! SET datestyle TO ...                        (in any case; for drivers that insist on it)
//! ```
//!
//! Keywords are upper case, as in PostgreSQL; unquoted names fold to lower case; one `;` may follow. What begins with no
//! known keyword is taken for SQL. Anything PostgreSQL has and this server has not is named in the error.

use super::lexer::{LexError, Lexer, Token};
use crate::backend::{ErrorFields, SqlState};
use crate::startup::parse_bool;
use crate::walproposer::{Proposes, ProtocolVersion, STOCK_VERSION};
use crate::{Lsn, PgTimelineId, Term};

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Who are you, and how far is your WAL?
    IdentifySystem,
    /// Value of a setting; the name is folded to lower case unless it was quoted.
    Show(String),
    /// Content of the history file of a Postgres timeline, which isn't 0.
    TimelineHistory(PgTimelineId),
    /// Position of a slot.
    ReadReplicationSlot(String),
    /// Make a physical slot.
    CreateReplicationSlot {
        /// Its name, unchecked.
        name: String,
        /// Dropped when the connection ends.
        temporary: bool,
        /// Keep WAL from now on, not from the first report.
        reserve_wal: bool,
    },
    /// Remove a slot.
    DropReplicationSlot {
        /// Its name.
        name: String,
        /// Wait until it isn't in use.
        wait: bool,
    },
    /// Stream WAL.
    StartReplication(StartReplication),
    /// Receive WAL from a proposer.
    StartWalPush(StartWalPush),
    /// Positions of a timeline (Neon).
    TimelineStatus,
    /// Fence off the primaries of a Postgres timeline and all older ones, lift that, or tell (ours).
    TimelineFence(TimelineFence),
    /// Who keeps the timeline (ours; the answer is JSON).
    TimelineMembers,
    /// One safekeeper tells another what it knows (ours; JSON both ways).
    PeerExchange(String),
    /// Sent by psycopg2 on connect.
    SetDatestyle,
}

/// Operands of START_REPLICATION.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartReplication {
    /// Slot to use.
    pub slot: Option<String>,
    /// First byte wanted.
    pub start: Lsn,
    /// Postgres timeline, which isn't 0; `None` = the current one.
    pub timeline: Option<PgTimelineId>,
    /// Neon: stream up to the end of WAL as long as the acceptor is in this term.
    pub term: Option<Term>,
}

/// Operands of START_WAL_PUSH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartWalPush {
    /// Version of the messages.
    pub version: ProtocolVersion,
    /// Create the timeline from the greeting if it isn't there.
    pub allow_timeline_creation: bool,
    /// Whose WAL it is.
    pub proposes: Proposes,
}

impl Default for StartWalPush {
    /// What counts for options left out.
    fn default() -> Self {
        Self { version: ProtocolVersion::V2, allow_timeline_creation: true, proposes: Proposes::Untold }
    }
}

/// Operands of TIMELINE_FENCE. Without any nothing is changed, and the answer tells how things are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimelineFence {
    /// The newest Postgres timeline to fence off, which isn't 0.
    pub pg_timeline: Option<PgTimelineId>,
    /// The least term to promise with it; at least the next one is.
    pub term: Option<Term>,
    /// Lift the fence. Not together with `pg_timeline`.
    pub clear: bool,
}

/// Why a command was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// It begins with no keyword of the replication protocol.
    #[error("cannot execute SQL commands in WAL sender for physical replication")]
    NotReplicationCommand,
    /// It begins well, and goes on badly.
    #[error("syntax error")]
    Syntax {
        /// What would have been right.
        expected: &'static str,
    },
    /// There is no Postgres timeline 0.
    #[error("invalid timeline 0")]
    InvalidTimeline,
    /// An option nobody knows.
    #[error("unrecognized option: {0}")]
    UnknownOption(String),
    /// An option with a value it cannot have.
    #[error("invalid value for option \"{option}\": \"{value}\"")]
    InvalidOption {
        /// The option.
        option: &'static str,
        /// Its value as sent.
        value: String,
    },
    /// PostgreSQL has it, this server does not.
    #[error("{0} is not supported by a safekeeper")]
    NotOffered(&'static str),
}

impl CommandError {
    /// The SQLSTATE a stock server would answer with.
    pub fn sqlstate(&self) -> SqlState {
        match self {
            CommandError::NotReplicationCommand | CommandError::NotOffered(_) => SqlState::FEATURE_NOT_SUPPORTED,
            CommandError::Syntax { .. } | CommandError::InvalidTimeline | CommandError::UnknownOption(_) => {
                SqlState::SYNTAX_ERROR
            }
            CommandError::InvalidOption { .. } => SqlState::INVALID_PARAMETER_VALUE,
        }
    }
}

impl From<CommandError> for ErrorFields {
    fn from(error: CommandError) -> Self {
        let fields = ErrorFields::error(error.sqlstate(), error.to_string());
        match error {
            CommandError::Syntax { expected } => fields.with_detail(format!("Expected {expected}.")),
            CommandError::NotReplicationCommand => fields.with_hint("Replication commands are written in upper case."),
            CommandError::NotOffered(_) => fields.with_hint("Connect to the PostgreSQL server instead."),
            _ => fields,
        }
    }
}

impl From<LexError> for CommandError {
    fn from(LexError(expected): LexError) -> Self {
        CommandError::Syntax { expected }
    }
}

impl Command {
    /// Parses the text of a simple query.
    pub fn parse(text: &str) -> Result<Self, CommandError> {
        if is_set_datestyle(text) {
            return Ok(Command::SetDatestyle);
        }
        let mut lexer = Lexer::new(text);
        let Ok(Some(Token::Word(keyword))) = lexer.next_token() else {
            return Err(CommandError::NotReplicationCommand);
        };
        let operands = || Parser::new(lexer);
        match keyword.as_str() {
            "IDENTIFY_SYSTEM" => operands()?.end(Command::IdentifySystem),
            "TIMELINE_STATUS" => operands()?.end(Command::TimelineStatus),
            "TIMELINE_FENCE" => operands()?.timeline_fence(),
            "TIMELINE_MEMBERS" => operands()?.end(Command::TimelineMembers),
            "PEER_EXCHANGE" => operands()?.peer_exchange(),
            "SHOW" => operands()?.show(),
            "TIMELINE_HISTORY" => operands()?.timeline_history(),
            "READ_REPLICATION_SLOT" => operands()?.read_slot(),
            "CREATE_REPLICATION_SLOT" => operands()?.create_slot(),
            "DROP_REPLICATION_SLOT" => operands()?.drop_slot(),
            "START_REPLICATION" => operands()?.start_replication(),
            "START_WAL_PUSH" => operands()?.start_wal_push(),
            "BASE_BACKUP" | "UPLOAD_MANIFEST" => Err(CommandError::NotOffered("a base backup")),
            "ALTER_REPLICATION_SLOT" => Err(CommandError::NotOffered("logical replication")),
            _ => Err(CommandError::NotReplicationCommand),
        }
    }
}

fn is_set_datestyle(text: &str) -> bool {
    const START: &str = "set datestyle to ";
    text.get(..START.len()).is_some_and(|start| start.eq_ignore_ascii_case(START))
}

/// Reads the operands of one command.
struct Parser<'a> {
    lexer: Lexer<'a>,
    /// The token not consumed yet.
    next: Option<Token>,
}

impl<'a> Parser<'a> {
    fn new(mut lexer: Lexer<'a>) -> Result<Self, CommandError> {
        let next = lexer.next_token()?;
        Ok(Self { lexer, next })
    }

    /// Consumes the next token.
    fn advance(&mut self) -> Result<Option<Token>, CommandError> {
        let following = self.lexer.next_token()?;
        Ok(std::mem::replace(&mut self.next, following))
    }

    /// Consumes the next token if it is this one.
    fn eat(&mut self, token: &Token) -> Result<bool, CommandError> {
        let found = self.next.as_ref() == Some(token);
        if found {
            self.advance()?;
        }
        Ok(found)
    }

    fn eat_keyword(&mut self, keyword: &str) -> Result<bool, CommandError> {
        self.eat(&Token::Word(keyword.to_owned()))
    }

    fn eat_symbol(&mut self, symbol: char) -> Result<bool, CommandError> {
        self.eat(&Token::Symbol(symbol))
    }

    fn expect(found: bool, expected: &'static str) -> Result<(), CommandError> {
        if found { Ok(()) } else { Err(CommandError::Syntax { expected }) }
    }

    /// Nothing may follow but one semicolon.
    fn end(mut self, command: Command) -> Result<Command, CommandError> {
        self.eat_symbol(';')?;
        Self::expect(self.next.is_none(), "the end of the command")?;
        Ok(command)
    }

    fn name(&mut self, expected: &'static str) -> Result<String, CommandError> {
        match self.advance()? {
            Some(Token::Word(word)) => Ok(word.to_lowercase()),
            Some(Token::QuotedName(name)) => Ok(name),
            _ => Err(CommandError::Syntax { expected }),
        }
    }

    fn timeline(&mut self) -> Result<PgTimelineId, CommandError> {
        let Some(Token::Number(digits)) = self.advance()? else {
            return Err(CommandError::Syntax { expected: "a Postgres timeline id" });
        };
        match digits.parse() {
            Ok(0) => Err(CommandError::InvalidTimeline),
            Ok(timeline) => Ok(PgTimelineId(timeline)),
            Err(_) => Err(CommandError::Syntax { expected: "a Postgres timeline id of 32 bits" }),
        }
    }

    /// The value of an option, if there is one: quoted text, a word or a number.
    fn option_value(&mut self) -> Result<Option<String>, CommandError> {
        if !matches!(self.next, Some(Token::Text(_) | Token::Word(_) | Token::Number(_))) {
            return Ok(None);
        }
        Ok(match self.advance()? {
            Some(Token::Text(value) | Token::Word(value) | Token::Number(value)) => Some(value),
            _ => None,
        })
    }

    /// Reads `( option, ... )`, the opening parenthesis being consumed already. Empty options are skipped.
    fn options(
        &mut self,
        mut option: impl FnMut(&mut Self, String) -> Result<(), CommandError>,
    ) -> Result<(), CommandError> {
        loop {
            if self.eat_symbol(')')? {
                return Ok(());
            }
            if !self.eat_symbol(',')? {
                let name = self.name("an option or \")\"")?;
                option(self, name)?;
                let separated = matches!(self.next, Some(Token::Symbol(',' | ')')));
                Self::expect(separated, "\",\" or \")\" behind an option")?;
            }
        }
    }

    fn show(mut self) -> Result<Command, CommandError> {
        let mut name = self.name("the name of a setting")?;
        while self.eat_symbol('.')? {
            name.push('.');
            name.push_str(&self.name("the name of a setting")?);
        }
        self.end(Command::Show(name))
    }

    fn timeline_history(mut self) -> Result<Command, CommandError> {
        let timeline = self.timeline()?;
        self.end(Command::TimelineHistory(timeline))
    }

    fn peer_exchange(mut self) -> Result<Command, CommandError> {
        match self.advance()? {
            Some(Token::Text(json)) => self.end(Command::PeerExchange(json)),
            _ => Err(CommandError::Syntax { expected: "quoted JSON" }),
        }
    }

    fn read_slot(mut self) -> Result<Command, CommandError> {
        let name = self.name("the name of a slot")?;
        self.end(Command::ReadReplicationSlot(name))
    }

    fn create_slot(mut self) -> Result<Command, CommandError> {
        let name = self.name("the name of a slot")?;
        let temporary = self.eat_keyword("TEMPORARY")?;
        if self.eat_keyword("LOGICAL")? {
            return Err(CommandError::NotOffered("logical replication"));
        }
        Self::expect(self.eat_keyword("PHYSICAL")?, "PHYSICAL")?;
        let mut reserve_wal = self.eat_keyword("RESERVE_WAL")?;
        if !reserve_wal && self.eat_symbol('(')? {
            self.options(|parser, option| {
                if option != "reserve_wal" {
                    return Err(CommandError::UnknownOption(option));
                }
                reserve_wal = match parser.option_value()? {
                    None => true,
                    Some(value) => {
                        parse_bool(&value).ok_or(CommandError::InvalidOption { option: "reserve_wal", value })?
                    }
                };
                Ok(())
            })?;
        }
        self.end(Command::CreateReplicationSlot { name, temporary, reserve_wal })
    }

    fn drop_slot(mut self) -> Result<Command, CommandError> {
        let name = self.name("the name of a slot")?;
        let wait = self.eat_keyword("WAIT")?;
        self.end(Command::DropReplicationSlot { name, wait })
    }

    fn start_replication(mut self) -> Result<Command, CommandError> {
        let slot = if self.eat_keyword("SLOT")? { Some(self.name("the name of a slot")?) } else { None };
        if self.eat_keyword("LOGICAL")? {
            return Err(CommandError::NotOffered("logical replication"));
        }
        self.eat_keyword("PHYSICAL")?;
        let Some(Token::Lsn(start)) = self.advance()? else {
            return Err(CommandError::Syntax { expected: "an LSN such as 0/16B3748" });
        };
        let mut operands = StartReplication { slot, start, timeline: None, term: None };
        if self.eat_keyword("TIMELINE")? {
            operands.timeline = Some(self.timeline()?);
        }
        if self.eat_symbol('(')? {
            operands.term = Some(self.term()?);
        }
        // Neon's safekeeper takes the term directly behind the LSN and ignores what follows it.
        if operands.timeline.is_none() && self.eat_keyword("TIMELINE")? {
            operands.timeline = Some(self.timeline()?);
        }
        self.end(Command::StartReplication(operands))
    }

    /// Reads `term = 'N' )`.
    fn term(&mut self) -> Result<Term, CommandError> {
        let option = self.name("an option")?;
        if option != "term" {
            return Err(CommandError::UnknownOption(option));
        }
        Self::expect(self.eat_symbol('=')?, "\"=\"")?;
        let value = self.option_value()?.ok_or(CommandError::Syntax { expected: "a term" })?;
        let term = value.parse().map_err(|_| CommandError::InvalidOption { option: "term", value })?;
        Self::expect(self.eat_symbol(')')?, "\")\"")?;
        Ok(Term(term))
    }

    fn start_wal_push(mut self) -> Result<Command, CommandError> {
        let mut operands = StartWalPush::default();
        let (mut stock, mut sync) = (false, false);
        if self.eat_symbol('(')? {
            self.options(|parser, option| {
                let value =
                    parser.option_value()?.ok_or(CommandError::Syntax { expected: "the value of an option" })?;
                match option.as_str() {
                    "proto_version" => operands.version = parse_version(value)?,
                    "allow_timeline_creation" => {
                        operands.allow_timeline_creation = parse_flag("allow_timeline_creation", value)?;
                    }
                    "primary_timeline" => {
                        operands.proposes = Proposes::WalOf(parse_pg_timeline("primary_timeline", value)?);
                    }
                    "sync" => sync = parse_flag("sync", value)?,
                    // Of another version of the extension is known only that it isn't this one.
                    "stock" => stock = value == STOCK_VERSION,
                    // Neon's safekeeper ignores what it doesn't know, so that newer computes can connect.
                    _ => {}
                }
                Ok(())
            })?;
        }
        if stock && operands.version == ProtocolVersion::V3 {
            operands.version = ProtocolVersion::V3Stock;
        }
        if sync {
            // Who follows a primary has WAL of its own to propose.
            if operands.proposes != Proposes::Untold {
                return Err(CommandError::InvalidOption { option: "sync", value: "true".to_owned() });
            }
            operands.proposes = Proposes::Nothing;
        }
        self.end(Command::StartWalPush(operands))
    }

    fn timeline_fence(mut self) -> Result<Command, CommandError> {
        let mut operands = TimelineFence::default();
        if self.eat_symbol('(')? {
            self.options(|parser, option| {
                let value =
                    parser.option_value()?.ok_or(CommandError::Syntax { expected: "the value of an option" })?;
                match option.as_str() {
                    "pg_timeline" => operands.pg_timeline = Some(parse_pg_timeline("pg_timeline", value)?),
                    "term" => {
                        let term = value.parse().map_err(|_| CommandError::InvalidOption { option: "term", value })?;
                        operands.term = Some(Term(term));
                    }
                    "clear" => operands.clear = parse_flag("clear", value)?,
                    // To ignore something here could mean to fence off less than was asked.
                    _ => return Err(CommandError::UnknownOption(option)),
                }
                Ok(())
            })?;
        }
        if operands.clear && (operands.pg_timeline.is_some() || operands.term.is_some()) {
            return Err(CommandError::InvalidOption { option: "clear", value: "true".to_owned() });
        }
        if operands.term.is_some() && operands.pg_timeline.is_none() {
            return Err(CommandError::Syntax { expected: "pg_timeline, which term goes with" });
        }
        self.end(Command::TimelineFence(operands))
    }
}

fn parse_version(value: String) -> Result<ProtocolVersion, CommandError> {
    match value.as_str() {
        "2" => Ok(ProtocolVersion::V2),
        "3" => Ok(ProtocolVersion::V3),
        _ => Err(CommandError::InvalidOption { option: "proto_version", value }),
    }
}

fn parse_flag(option: &'static str, value: String) -> Result<bool, CommandError> {
    match value.as_str() {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(CommandError::InvalidOption { option, value }),
    }
}

fn parse_pg_timeline(option: &'static str, value: String) -> Result<PgTimelineId, CommandError> {
    match value.parse() {
        Ok(0) => Err(CommandError::InvalidTimeline),
        Ok(timeline) => Ok(PgTimelineId(timeline)),
        Err(_) => Err(CommandError::InvalidOption { option, value }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn start(start: u64) -> StartReplication {
        StartReplication { slot: None, start: Lsn(start), timeline: None, term: None }
    }

    #[track_caller]
    fn parses(text: &str, command: Command) {
        assert_eq!(Command::parse(text), Ok(command), "{text}");
    }

    #[track_caller]
    fn refused(text: &str, code: SqlState) {
        match Command::parse(text) {
            Ok(command) => panic!("{text}: {command:?}"),
            Err(error) => assert_eq!(error.sqlstate(), code, "{text}: {error}"),
        }
    }

    #[test]
    fn stock_commands() {
        parses("IDENTIFY_SYSTEM", Command::IdentifySystem);
        parses(" IDENTIFY_SYSTEM\n;", Command::IdentifySystem);
        parses("SHOW data_directory_mode", Command::Show("data_directory_mode".into()));
        parses("SHOW WAL_Segment_Size;", Command::Show("wal_segment_size".into()));
        parses("SHOW \"TimeZone\"", Command::Show("TimeZone".into()));
        parses("SHOW sk.timeline_id", Command::Show("sk.timeline_id".into()));
        parses("TIMELINE_HISTORY 2", Command::TimelineHistory(PgTimelineId(2)));
        parses("READ_REPLICATION_SLOT Rs_15", Command::ReadReplicationSlot("rs_15".into()));
        parses("DROP_REPLICATION_SLOT \"s1\"", Command::DropReplicationSlot { name: "s1".into(), wait: false });
        parses("DROP_REPLICATION_SLOT s1 WAIT;", Command::DropReplicationSlot { name: "s1".into(), wait: true });
    }

    #[test]
    fn create_slot_in_old_and_new_form() {
        let create = |name: &str, temporary, reserve_wal| Command::CreateReplicationSlot {
            name: name.into(),
            temporary,
            reserve_wal,
        };
        parses("CREATE_REPLICATION_SLOT \"Bad-Name\" PHYSICAL", create("Bad-Name", false, false));
        parses("CREATE_REPLICATION_SLOT s PHYSICAL RESERVE_WAL", create("s", false, true));
        parses("CREATE_REPLICATION_SLOT s TEMPORARY PHYSICAL ( RESERVE_WAL)", create("s", true, true));
        parses("CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL false)", create("s", false, false));
        parses("CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL 'on')", create("s", false, true));
        refused("CREATE_REPLICATION_SLOT s LOGICAL pgoutput", SqlState::FEATURE_NOT_SUPPORTED);
        refused("CREATE_REPLICATION_SLOT s PHYSICAL (TWO_PHASE)", SqlState::SYNTAX_ERROR);
        refused("CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL maybe)", SqlState::INVALID_PARAMETER_VALUE);
        refused("CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL", SqlState::SYNTAX_ERROR);
        refused("CREATE_REPLICATION_SLOT s", SqlState::SYNTAX_ERROR);
        refused("CREATE_REPLICATION_SLOT", SqlState::SYNTAX_ERROR);
    }

    #[test]
    fn start_replication_of_stock_clients() {
        parses("START_REPLICATION 0/3000000", Command::StartReplication(start(0x300_0000)));
        parses(
            "START_REPLICATION SLOT \"rs_15\" PHYSICAL f/ff000000 TIMELINE 2;",
            Command::StartReplication(StartReplication {
                slot: Some("rs_15".into()),
                timeline: Some(PgTimelineId(2)),
                ..start(0xF_FF00_0000)
            }),
        );
        refused("START_REPLICATION foo", SqlState::SYNTAX_ERROR);
        refused("START_REPLICATION", SqlState::SYNTAX_ERROR);
        refused("START_REPLICATION 0/1 TIMELINE 0", SqlState::SYNTAX_ERROR);
        refused("START_REPLICATION 0/1 TIMELINE 4294967296", SqlState::SYNTAX_ERROR);
        refused("START_REPLICATION 0/1 TIMELINE 1 junk", SqlState::SYNTAX_ERROR);
        refused("START_REPLICATION 100000000/1", SqlState::SYNTAX_ERROR);
        refused("START_REPLICATION SLOT s LOGICAL 0/0 (proto_version '1')", SqlState::FEATURE_NOT_SUPPORTED);
    }

    #[test]
    fn start_replication_of_neon() {
        let with_term = StartReplication { term: Some(Term(5)), ..start(0x1A2_B3C8) };
        parses("START_REPLICATION PHYSICAL 0/1A2B3C8 (term='5')", Command::StartReplication(with_term.clone()));
        let with_both = StartReplication { timeline: Some(PgTimelineId(1)), ..with_term };
        parses(
            "START_REPLICATION PHYSICAL 0/1A2B3C8 (term='5') TIMELINE 1",
            Command::StartReplication(with_both.clone()),
        );
        parses("START_REPLICATION PHYSICAL 0/1A2B3C8 TIMELINE 1 (term='5')", Command::StartReplication(with_both));
        refused("START_REPLICATION 0/1 (term='x')", SqlState::INVALID_PARAMETER_VALUE);
        refused("START_REPLICATION 0/1 (term='18446744073709551616')", SqlState::INVALID_PARAMETER_VALUE);
        refused("START_REPLICATION 0/1 (term='5'", SqlState::SYNTAX_ERROR);
        refused("START_REPLICATION 0/1 (leader='5')", SqlState::SYNTAX_ERROR);
    }

    #[test]
    fn start_wal_push_options_have_defaults() {
        let push = |version, allow_timeline_creation| {
            let proposes = Proposes::Untold;
            Command::StartWalPush(StartWalPush { version, allow_timeline_creation, proposes })
        };
        parses("START_WAL_PUSH", push(ProtocolVersion::V2, true));
        parses("START_WAL_PUSH ()", push(ProtocolVersion::V2, true));
        parses("START_WAL_PUSH (proto_version '3', allow_timeline_creation 'false')", push(ProtocolVersion::V3, false));
        parses("START_WAL_PUSH (proto_version 3, newer_option 'x',)", push(ProtocolVersion::V3, true));
        parses("START_WAL_PUSH (proto_version '3', stock '1')", push(ProtocolVersion::V3Stock, true));
        parses("START_WAL_PUSH (stock '1', proto_version '3')", push(ProtocolVersion::V3Stock, true));
        parses("START_WAL_PUSH (proto_version '3', stock '2')", push(ProtocolVersion::V3, true));
        parses("START_WAL_PUSH (proto_version '2', stock '1')", push(ProtocolVersion::V2, true));
        refused("START_WAL_PUSH (proto_version '4')", SqlState::INVALID_PARAMETER_VALUE);
        refused("START_WAL_PUSH (allow_timeline_creation 'perhaps')", SqlState::INVALID_PARAMETER_VALUE);
        refused("START_WAL_PUSH (proto_version)", SqlState::SYNTAX_ERROR);
        refused("START_WAL_PUSH (proto_version '3' allow_timeline_creation 'true')", SqlState::SYNTAX_ERROR);
        refused("START_WAL_PUSH (proto_version '3'", SqlState::SYNTAX_ERROR);
    }

    #[test]
    fn a_proposer_says_what_it_proposes() {
        let push = |proposes| {
            let version = ProtocolVersion::V3Stock;
            Command::StartWalPush(StartWalPush { version, allow_timeline_creation: true, proposes })
        };
        let of = |options: &str| format!("START_WAL_PUSH (proto_version '3', stock '1', {options})");
        parses(&of("primary_timeline '7'"), push(Proposes::WalOf(PgTimelineId(7))));
        parses(&of("sync 'true'"), push(Proposes::Nothing));
        parses(&of("sync 'false'"), push(Proposes::Untold));
        parses(&of("sync 'false', primary_timeline '7'"), push(Proposes::WalOf(PgTimelineId(7))));
        refused(&of("sync 'true', primary_timeline '7'"), SqlState::INVALID_PARAMETER_VALUE);
        refused(&of("primary_timeline '7', sync 'true'"), SqlState::INVALID_PARAMETER_VALUE);
        refused(&of("primary_timeline '0'"), SqlState::SYNTAX_ERROR);
        refused(&of("primary_timeline '4294967296'"), SqlState::INVALID_PARAMETER_VALUE);
        refused(&of("primary_timeline '-1'"), SqlState::INVALID_PARAMETER_VALUE);
        refused(&of("sync 'perhaps'"), SqlState::INVALID_PARAMETER_VALUE);
        refused(&of("primary_timeline"), SqlState::SYNTAX_ERROR);
    }

    #[test]
    fn fences_are_set_lifted_and_told() {
        let fence = |timeline: Option<u32>, term: Option<u64>, clear| {
            let (pg_timeline, term) = (timeline.map(PgTimelineId), term.map(Term));
            Command::TimelineFence(TimelineFence { pg_timeline, term, clear })
        };
        parses("TIMELINE_FENCE", fence(None, None, false));
        parses("TIMELINE_FENCE ();", fence(None, None, false));
        parses("TIMELINE_FENCE (pg_timeline '3')", fence(Some(3), None, false));
        parses("TIMELINE_FENCE (term '9', pg_timeline 3)", fence(Some(3), Some(9), false));
        parses("TIMELINE_FENCE (clear 'true')", fence(None, None, true));
        parses("TIMELINE_FENCE (clear 'false', pg_timeline '3')", fence(Some(3), None, false));
        refused("TIMELINE_FENCE (clear 'true', pg_timeline '3')", SqlState::INVALID_PARAMETER_VALUE);
        refused("TIMELINE_FENCE (clear 'true', term '3')", SqlState::INVALID_PARAMETER_VALUE);
        refused("TIMELINE_FENCE (term '3')", SqlState::SYNTAX_ERROR);
        refused("TIMELINE_FENCE (term 'x', pg_timeline '3')", SqlState::INVALID_PARAMETER_VALUE);
        refused("TIMELINE_FENCE (pg_timeline '0')", SqlState::SYNTAX_ERROR);
        refused("TIMELINE_FENCE (pg_timeline 'x')", SqlState::INVALID_PARAMETER_VALUE);
        refused("TIMELINE_FENCE (pg_timeline)", SqlState::SYNTAX_ERROR);
        refused("TIMELINE_FENCE (timeline '3')", SqlState::SYNTAX_ERROR);
        refused("TIMELINE_FENCE 3", SqlState::SYNTAX_ERROR);
    }

    #[test]
    fn neon_commands_and_psycopg() {
        parses("TIMELINE_STATUS", Command::TimelineStatus);
        parses("SET datestyle TO 'ISO'", Command::SetDatestyle);
        parses("set DateStyle to iso", Command::SetDatestyle);
    }

    #[test]
    fn refusals_have_the_codes_of_a_stock_server() {
        for sql in ["identify_system", "SELECT 1", "", ";", "  ", "BEGIN", "set timezone to x", "\"SHOW\" x", "é", "#"]
        {
            refused(sql, SqlState::FEATURE_NOT_SUPPORTED);
        }
        for bad in ["IDENTIFY_SYSTEM; IDENTIFY_SYSTEM", "IDENTIFY_SYSTEM 1", "IDENTIFY_SYSTEM;;", "SHOW", "SHOW 'x'"] {
            refused(bad, SqlState::SYNTAX_ERROR);
        }
        refused("TIMELINE_HISTORY 0", SqlState::SYNTAX_ERROR);
        refused("TIMELINE_HISTORY two", SqlState::SYNTAX_ERROR);
        refused("BASE_BACKUP ( LABEL 'x',  PROGRESS,  WAIT 0)", SqlState::FEATURE_NOT_SUPPORTED);
        assert_eq!(Command::parse("TIMELINE_HISTORY 0"), Err(CommandError::InvalidTimeline));
        let fields = ErrorFields::from(Command::parse("SHOW 'x'").unwrap_err());
        assert_eq!((fields.message.as_str(), fields.code), ("syntax error", SqlState::SYNTAX_ERROR));
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text: String) {
            let _ = Command::parse(&text);
        }

        #[test]
        fn arbitrary_operands_never_panic(
            keyword in prop::sample::select(&["SHOW", "START_REPLICATION", "START_WAL_PUSH", "TIMELINE_FENCE", "CREATE_REPLICATION_SLOT"][..]),
            operands in "[(),.;='\" A-Z0-9/_]{0,60}",
        ) {
            let _ = Command::parse(&format!("{keyword} {operands}"));
        }
    }
}
