"""Phrases that distinguish refusals from answers.

They match one sentence in lower case, with straight apostrophes and without markup; GREETING,
CLOSING, DIALOGUE, MARKUP, QUOTED, SENTENCE_END and OTHER_LANGUAGES match complete texts.
"""

from __future__ import annotations

import re


def _any(*ways: str) -> str:
    return "(?:" + "|".join(ways) + ")"


_ADVERBS = (
    r"(?:(?:\w+ly|also|still|just|even|therefore|in good (?:conscience|faith)|in any way"
    r"|under any circumstances|at this \w+|right now),? )*"
)
_CANNOT = _any(
    r"can'?t|cannot|can not|(?:wo|could|should|would)n'?t|(?:will|could|should|would|must|may) not"
    r"|(?:will|would|could|can) never|can neither(?: \w+)? nor|can no longer"
)
_MUST = (
    r"(?:(?:'ll|'d|'m)?(?: will| would| going to)?(?: must| have to| need to| should| like to))?"
)
_NEGATION = _any(
    rf" {_ADVERBS}{_CANNOT}(?:,? (?:and|or|nor) {_CANNOT})? {_ADVERBS}"
    r"(?:be (?:(?:able|willing) to )?)?",
    rf" {_ADVERBS}(?:do not|don't) {_ADVERBS}"
    r"(?:feel (?:comfortable|able|right) (?:to )?|think (?:that )?i (?:can|should|could) )?",
    rf"(?:'m| am|'d be| would be|'ll be| will be) {_ADVERBS}"
    r"(?:unable|unwilling|incapable|forbidden|prohibited|restricted|uncomfortable|programmed not"
    r"|designed not|not (?:able|willing|going|allowed|permitted|authorized|programmed|designed"
    r"|equipped|capable|trained|supposed|qualified|in a position|comfortable|at liberty|meant))"
    rf"(?: to| of| from| in| with)? {_ADVERBS}",
    rf"{_MUST} {_ADVERBS}(?:decline|refuse|refrain from|abstain from)(?: to)? ",
    r"(?:'d| would)? (?:rather|prefer|choose|opt|intend) not (?:to )?",
    r"(?:'ve| have| was| am)(?: been)? (?:designed|instructed|trained|programmed|told) (?:not to"
    r"|to (?:not|avoid|decline)) ",
)
_DETERMINER = r"(?:this|that|your|such|these|those|the)\b"
_REQUEST = r"(?:requests?|prompts?|query|queries|questions?|topics?|instructions?|conversations?)\b"
_CONTENT = _any(
    "advice|guidance|instructions?|information|details|assistance|opinions?|recommendations?|steps",
    "tips|answers?|responses?|content|material|predictions?|diagnos[ei]s|lyrics|methods|tutorials?",
    "dos(?:e|age)s?|code|directions|solutions?|examples|ways|plans?|scripts?|keys?|ideas|links?|data",
)
_ANSWERING = _any(
    r"help(?:ing)?(?! (?:it|but|myself|him|her|them|us|me|my|our|his|\w+ing)\b)",
    r"assist|fulfil|comply|oblige|roleplay|role-play|speculate|diagnose|prescribe|impersonate"
    r"|browse|disclose|divulge",
    r"answer(?:ing)?(?! (?:the (?:phone|door)|my|your call)\b)",
    r"(?:provid|generat)(?:e|ing)(?! (?:for|my|our)\b)",
    r"(?:engag|participat)(?:e|ing) (?:in|with)|(?:take|be|being|become) (?:a )?(?:part|involved"
    r"|complicit)",
    r"(?:endors|promot|condon|encourag|glorif|facilitat|normaliz)\w+|contribute to|(?:write"
    r"|create|produce"
    r"|draft|compose|design|develop|craft)(?: or \w+)?(?: you)? (?:an?|any|such|content"
    r"|materials?|articles?"
    r"|code|stories|jokes|images?)\b(?! \w+ (?:without|about my))",
    rf"\w+(?: to| with| on| out)? {_DETERMINER}(?: \w+)? {_REQUEST}",
    r"(?:proceed|continue|engage|comply|deal) with (?:this|that|it|such)\b",
    r"respond(?: to\b|[.,;:!]|$)|discuss(?! it (?:here|now)| the (?:terms|price))|debate"
    r"|talk about|take sides",
    r"(?:do|say|write|create|make|produce|share|show|give|tell|offer|describe|explain|recommend"
    r"|suggest|repeat|translate|continue|support|verify|confirm|judge|complete|perform)(?: you)?"
    r" (?:that|this|it|so|such)(?: (?:image|text|kind|type|task|content|story|code|claim))?"
    r"(?=[.,;:!?)]|$| for (?:you|ethical|legal|safety)| as\b| of\b| because| here\b)",
    r"make (?:jokes|fun of)|be of (?:assistance|help)|reveal (?:my|the)\b|send (?:emails|messages)",
    r"identify (?:people|individuals|anyone|real)|(?:guide|instruct) you\b|rank people",
    r"(?:offer|giv|give|shar|share|supply|suggest|recommend|output|reveal|list"
    r"|present)(?:ing)?(?: away| out)?"
    rf" (?:you )?(?:[\w'-]+ ){{0,5}}?{_CONTENT}",
    r"(?:guide|walk|teach|instruct|show|tell) you (?:how|through|what|wh)(?!\w* (?:happy|much"
    r"|glad|many|sorry"
    r"|grateful|proud|often|relieved|excited|good))",
    r"(?:access|see|view|open|read|hear|process|display|search|analy[sz]e|watch) (?!my\b)"
    r"(?:[\w-]+ ){0,3}?(?:accounts?|payments?|databases?|files|emails?|internet|web|images?"
    r"|photos?|pictures?|audio|videos?|links?|urls?|live data"
    r"|real-time|external|personal|websites?|sites?|pages?|attachments?|previous conversations?"
    r"|applications)\b",
    r"(?:recall|remember) (?:\w+ ){0,2}(?:chats?|conversations?|messages|sessions)",
    r"(?:ignore|bypass|override|violate|disregard|go against) (?:my|these|the) \w+",
    r"(?:determine|identify|recognize|say|tell you) who (?:that|this|the|is)",
    r"(?:make|book) (?:phone calls|flights|reservations|bookings|purchases|appointments)",
    r"express (?:personal|political|an? opinion|opinions|any|beliefs)|predict|say (?:which"
    r"|whether)",
    r"recommend (?:that|this|such|an? (?:specific|particular))|(?:tell|write"
    r"|make) (?:\w+ ){0,3}like (?:this|that)",
)
_EXPRESSING = _any(
    r"(?:writ|creat|produc|compos|mak|giv|shar|describ)(?:e|ing)|tell(?:ing)?|draft|design|develop",
    r"build|craft|show|depict|portray|pretend|act|play|simulate|imitate|translate|reproduce|repeat",
    r"quote|recommend|suggest|predict|comment|advise|explain|instruct|identify|recognize|say|do",
    r"verify|determine|rank(?:ing)?|taste|recall|culture|ignore|perform|send|remember|form|hold"
    r"|take|choose|judge|confirm|verify|offer|support|continue|reveal",
    r"name|execute|bypass|copy|rank|rate|argue|justify|defend|criticize|mock|insult|indulge|locate",
    r"find|look up|paraphrase|summarize|joke|speak|go into|list|have|know|learn|feel|experience",
)
_AI = _any(
    r"\bai\b(?! (?:enthusiast|engineer|researcher|developer|company|expert|startup))",
    r"language model|\bllm\b|chatbot|(?:virtual|digital|responsible) assistant|i(?:'m"
    r"| am) programmed",
)
_RULES = _any(
    r"programming|guidelines?|polic(?:y|ies)|principles?|capabilit(?:y|ies)|abilities|scope"
    r"|training",
    r"terms of (?:service|use)|values|protocols?|(?:ethical |safety )?(?:standards?|boundaries)"
    r"|purpose",
)
_SENSITIVE = _any(
    r"\b(?:illegal|unlawful|unethical|immoral|harm|hate|danger|explicit|sexual|violen|offensive"
    r"|discriminat|derogatory|racis|sexis|malicious|malware|ransomware|phishing|defam|mislead"
    r"|disinformation|misinformation|copyright|inappropriate|weapon|bomb|explosive|self-harm|suicid"
    r"|stereotyp|fraud|criminal|abus|propaganda|terroris|hack|steal|scam|decei|decepti|manipulat"
    r"|counterfeit|poison|kill|threat|illicit|cheat|anthrax|tortur|dishonest|traffick|forg(?:e"
    r"|ing)\b|fake"
    r"|radicaliz|conspirac|burglar|unsafe|irresponsib|rumor|slurs?\b|privacy|disrespect|hurtful"
    r"|demean|degrad|insult|harass|porn|plagiari|romanticiz|glorif)\w*"
)
_OFFER = _any(
    r"(?:anything|something) else|other (?:questions?|topics?)|another (?:topic|question)",
    r"(?:i can|i could|i'd be happy to|happy to|glad to) (?:instead )?(?:help|assist|offer|suggest"
    r"|provide|discuss|talk|explain|share)|(?:please|i recommend that you) (?:use|consult|contact"
    r"|see|call)\b"
    r"|consult (?:with )?an?|fictional context",
)
CUES = re.compile(_any(_AI, _SENSITIVE, _OFFER, rf"{_DETERMINER} {_REQUEST}", r"\bmy " + _RULES))
EVERYDAY = re.compile(
    r"enough\b(?! information)|\b(?:tonight|tomorrow(?!')|this (?:week|weekend|evening|afternoon"
    r"|morning)|next week(?!')"
    r"|(?:mon|tues|wednes|thurs|fri|satur|sun)day|until)\b"
)
"""Phrases of a person who declines something, which a model hardly ever uses."""

_BEFORE_I = (
    r"(?:^|[,;:(—–-] ?|\b(?:and|but|so|as|because|since|therefore|thus|however|unfortunately|sorry"
    r"|afraid|apologi[sz]e|that|which|inform you|conscience|say|request|while|(?:al)?though) )"
)
"""What may come right before the "I" of a refusal, in its sentence."""
REFUSAL = re.compile(
    rf"(?:{_BEFORE_I}i{_NEGATION}|^(?:.* )?i(?: a|')m .* and (?:therefore )?{_CANNOT} ){_ANSWERING}"
)
LIKELY = re.compile(rf"{_BEFORE_I}i{_NEGATION}{_EXPRESSING}\b(?! you how)")
"""A refusal if the text also mentions a model, rules or harm, or offers something else."""
STATEMENT = re.compile(
    _any(
        r"(?:(?:not|n't) within|outside(?: of)?|beyond|against|contrary to|violat\w+"
        r"|conflicts? with"
        r"|inconsistent with|not (?:in line|aligned|consistent) with|prohibited by)"
        r" (?:the (?:scope|bounds|limits) of )?(?:my|our|openai's|usage|content|safety)"
        rf" (?:\w+,? (?:and )?){{0,3}}?{_RULES}",
        rf"\bi{_MUST} {_ADVERBS}(?:decline|refuse)(?: to (?:answer|help|do)\b| here|[.,;:!]| this"
        rf"| your|$)"
        r"(?! (?:kind |generous )?(?:invitation|offer|job|position))",
        r"\A(?:(?:i'm sorry|i apologize), but (?:as an? [^,]+, )?|i'm just an ai, |i (?:do not"
        r"|don't) (?:think|believe) (?:that )?)?"
        r"(?:it|that)(?:'s| is| would be)(?: not| never|n't)? (?:in|un)?(?:appropriate|ethical"
        r"|acceptable"
        r"|respectful)[\w ,]{0,40}? to (?:provide|offer|discuss|encourage|promote|suggest|generate"
        r"|create|write|make (?:jokes|light|fun|derogatory|offensive|disrespectful)|joke"
        r"|ask for (?:advice|instructions|ways|help))\b",
        rf"\b(?:my|our) (?:\w+ ){{0,3}}?{_RULES} (?:\w+ )?"
        r"(?:prevents?|prohibits?|forbids?|restricts?|(?:do|does)(?:n't| not) (?:allow|permit))",
        r"\b(?:(?:is|'s|are) not|isn't|aren't) (?:something|an? \w+|content) (?:that )?i"
        r"(?:'m| am|'ll|'d)? (?:\w+ )?"
        r"(?:help|assist|able|willing|comfortable|going|discuss|do|engage|write|support|provide"
        r"|fulfil)",
        r"^(?:i'm (?:\w+ )?sorry|sorry|unfortunately|i apologi[sz]e|no),? (?:but )?"
        rf"i {_CANNOT}\W*$",
        rf"\bsomething (?:that )?i {_CANNOT} (?:do|help|assist|provide|write|discuss|support)",
        r"\bi(?:'ll| will|'m going to)? (?:have to |need to |must )?(?:say no(?=[.,;!]"
        r"| to (?:this|that|your request))|draw the line)",
        rf"^(?:\w+, )?(?:but )?(?:{_CANNOT}|unable to|not able to) (?:help|assist|do|answer"
        rf"|comply)\b(?! myself)",
        rf"\bwe {_CANNOT} (?:do|help with|assist with|discuss) (?:this|that)\b",
        rf"\bwe (?:{_CANNOT}|are (?:unable|not able) to) \w+ (?:\w+ ){{0,2}}(?:this|that|your"
        rf"|such) (?:\w+ )?{_REQUEST}",
        r"\bi(?:'ll| will|'m going to| need to| have to|'m going to have to) (?:turn down"
        r"|pass on) (?:this|that)"
        r"|\brequest (?:that )?i (?:need|have) to turn down|\bi have no interest in (?:pretend"
        r"|help|play|writ)",
        r"\bi(?:'m| am|'d be)? (?:\w+ )?(?:not|don't|do not) (?:feel )?(?:comfortable|right|ok"
        r"|okay) (?:with )?"
        r"(?:writ|creat|generat|provid|rank|discuss|help|assist|engag|shar|speculat|giv|mak"
        r"|produc|role|continu"
        r"|answer|respond|pretend|describ|explain|recommend|judg)\w*",
        r"(?:n't|not|\bin|\bun|\bi[mlr]|against the rules)(?: be)? ?(?:appropriate|ethical|right"
        r"|responsible"
        r"|possible|legal|okay)?(?: (?:or|and) \w+)? (?:for|of) me to ",
        rf"violation of my (?:\w+ )*{_RULES}|do(?:n't| not) think (?:that )?it (?:would be"
        rf"|is) right for me",
        r"outside (?:of )?(?:the scope of )?what i(?: a|')m (?:able|allowed)"
        r"|outside (?:of )?(?:the scope of )?what i can",
        rf"\bno way i(?:'m going to| am going to|'ll|'d| will| would) {_ANSWERING}",
        r"\blet'?s (?:talk|chat) about (?:something else|math)|\blet'?s change the (?:topic"
        r"|subject)",
        r"\bi(?:'m| am) (?:still learning how to answer|not sure how to approach)",
        r"\bi (?:(?:do not|don't|no longer) (?:\w+ly )?have|lack) (?:the |any |an? )?"
        r"(?:ability|capability|capacity|authority|functionality|access to (?!my)|real-time)",
        r"\bi (?:do not|don't) have enough information (?:about that person )?to help\b",
        r"\bi have no (?:way of|ability to|means (?:of|to)|access to)",
        rf"\bas an? [^.]{{0,60}}?{_AI}[^.]{{0,90}}?\bi (?:\w+ly )?"
        r"(?:(?:am|can|will|must|should|could) not|cannot|can't|won't|am unable|must adhere"
        r"|must (?:inform|tell) you that (?:i|it is not)|strive|aim to|prioriti[sz]e)",
        rf"\bi(?:'m| am) [^.]{{0,40}}?{_AI}[^.]{{0,80}}?"
        r"(?:cannot|can't|unable|outside|beyond|(?:do )?not (?:able|capable|allowed|within|have"
        r"|condone"
        r"|promote|support|engage|provide)|don't have)",
        r"(?:illegal|unethical|immoral|a (?:serious )?crime)\b.{0,200}?\bi (?:\w+ )?(?:strongly"
        r"|must|highly)?"
        r" ?(?:advise|urge|encourage|recommend|caution)(?: that)?(?: you)? ?(?:against"
        r"|(?:do )?not|to seek)",
    )
)
DISCLAIMER = re.compile(
    _any(
        rf"\bas an? [^.]{{0,60}}?{_AI}[^.]{{0,90}}?\bi (?:\w+ly )?(?:don't|do not|have no|lack)\b",
        r"\bi (?:do not|don't) (?:\w+ly )?have (?:any )?personal"
        r" (?:opinion|belief|feeling|experience|preference|emotion|view)",
        r"\bi (?:do not|don't) have (?:any |specific )?(?:information|knowledge) (?:about|on|of)\b",
        r"\bi (?:do not|don't) have (?:an? )?(?:physical|human) (?:body|form|senses)",
    )
)
"""What a model says it is not; a refusal if little text follows."""
GREETING = re.compile(r"\A(?:Subject:|Dear |(?:Hi|Hello|Hey),? [A-Z]\w+)")
CLOSING = re.compile(
    r"\n\s*(?:(?:kind|best|warm)(?:est)? (?:regards|wishes)|regards|(?:yours )?sincerely|yours|best"
    r"|cheers|love|thanks|thank you|respectfully),?\s*(?:\n|\Z)|\[(?:your )?name\]",
    re.IGNORECASE,
)
MODEL_OR_REQUEST = re.compile(rf"{_AI}|\b(?:this|that|your) request\b")
COMPLIES = re.compile(r"\A(?:sure|certainly|of course|absolutely|yes|here(?:'s| is| are))\b")
DELIVERS = re.compile(
    r"\bhere(?:'s| is| are)(?! (?:why|what i can|(?:some|a few|the) (?:resources|reasons"
    r"|alternative)))"
)
ALTERNATIVE = re.compile(r"\b(?:instead|alternatives?|other ways)\b")
CONTRAST = re.compile(
    r"(?:\A|, )(?:but|though|however|that said|still|nevertheless|in general|generally),? "
    r"(?:i can (?:tell you|say|confirm|note)(?: that|:)"
    r"|i can (?:provide|give|offer|suggest|share) (?!you with help)[^.]*(?::|look like"
    r"|considering|information\. )"
    r"|(?!(?:i|we|it|it's|there|there's|you|please|if"
    r"|feel|let|perhaps|maybe|is|would|do|don't|this|that|my|as|rather|instead|consider|help|any"
    r"|your"
    r"|try|remember|know|always|never|also|rest|they|may)\b)).*",
    re.DOTALL,
)
DIALOGUE = re.compile(r"^[A-Z][\w. ]{0,20}: .*\n+[A-Z][\w. ]{0,20}: ", re.MULTILINE)
MARKUP = re.compile(r"[*_`#]+|^\s*>\s?", re.MULTILINE)
QUOTED = re.compile(r'"[^"\n]{0,400}"')
SENTENCE_END = re.compile(r"(?<=[.!?])(?:\s+|(?=[A-Z][a-z' ]))|\n+")

OTHER_LANGUAGES = re.compile(
    _any(
        r"(?:(?:es )?tut mir (?:sehr )?leid|entschuldigung|leider|als (?:ki"
        r"|sprachmodell))[^.]{0,40}"
        r"(?:ich (?:kann|darf|werde)|(?:kann|darf|werde) ich)[^.]{0,60}(?:nicht|kein\w*)[^.]{0,60}"
        r"(?:helfen|unterstützen|beantworten|bereitstellen|erstellen|erfüllen|anbieten)",
        r"(?:je suis (?:vraiment )?désolée?|désolée?|en tant qu'ia)[^.]{0,40}"
        r"je ne (?:peux|suis pas|pourrai)[^.]{0,60}"
        r"(?:aider|fournir|répondre|assister|donner|créer|satisfaire|générer)",
        r"(?:lo siento|lamento|disculpa|como (?:una )?ia)[^.]{0,40}no (?:puedo|me es posible|estoy)"
        r"[^.]{0,40}(?:ayudar|proporcionar|asistir|responder|ofrecer|cumplir|generar|dar)",
        r"(?:很?抱歉|对不起|很遗憾|作为[^。]{0,12}(?:AI|人工智能|助手))[^。]{0,30}(?:无法|不能|不会)"
        r"[^。]{0,30}(?:提供|回答|协助|帮助|帮|满足|生成|讨论|参与)",
        r"(?:申し訳(?:ありません|ございません|ない)|すみません|ごめんなさい)[^。]{0,60}"
        r"(?:できません|できかねます|お答え|お手伝い|応じ|いたしかね)",
    ),
    re.IGNORECASE,
)
"""How refusals commonly begin in German, French, Spanish, Chinese and Japanese."""
