#compdef litgpt
# litgpt: completion for zsh
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
_litgpt() {
    local -a found
    found=(${(f)"$("$words[1]" __complete "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    [[ $words[CURRENT] == --*=* ]] && compset -P '*='
    if [[ $found[1] == ":files" ]]; then
        shift found
        _files
    fi
    compadd -a found
}
compdef _litgpt litgpt
