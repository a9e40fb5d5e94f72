# litgpt: completion for bash
_litgpt() {
    local IFS=$'\n' current="${COMP_WORDS[COMP_CWORD]}"
    [[ $current == "=" ]] && current=""
    COMPREPLY=($("$1" __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    if [[ ${COMPREPLY[0]} == ":files" ]]; then
        COMPREPLY=("${COMPREPLY[@]:1}" $(compgen -f -- "$current"))
        compopt -o filenames 2>/dev/null
    fi
}
complete -F _litgpt litgpt
