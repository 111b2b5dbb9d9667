{{- define "img2img.gatewayEnv" -}}
- {name: IMG2IMG_HOST, value: {{ .Values.gateway.host | quote }}}
- {name: IMG2IMG_HTTP_PORT, value: "8000"}
- {name: IMG2IMG_GRPC_PORT, value: "50051"}
{{ include "img2img.redisUrl" . }}
- {name: IMG2IMG_BLOBS, value: {{ .Values.blobs.url | quote }}}
- {name: IMG2IMG_POOLS_FILE, value: /etc/img2img/pools/pools.toml}
- {name: IMG2IMG_TENANTS_FILE, value: /etc/img2img/tenants/tenants.toml}
- {name: IMG2IMG_DRAIN_TIMEOUT, value: {{ include "img2img.scalar" .Values.gateway.drainSeconds | quote }}}
{{- if .Values.gateway.tls.existingSecret }}
- {name: IMG2IMG_TLS_CERT, value: /etc/img2img/tls/tls.crt}
- {name: IMG2IMG_TLS_KEY, value: /etc/img2img/tls/tls.key}
{{- end }}
- {name: IMG2IMG_SCALER_TARGET_SECONDS, value: {{ include "img2img.scalar" .Values.poolDefaults.autoscaling.targetSeconds | quote }}}
{{- if .Values.scaler.serverSecret }}
- {name: IMG2IMG_SCALER_PORT, value: {{ include "img2img.scalar" .Values.scaler.port | quote }}}
- {name: IMG2IMG_SCALER_TLS_CERT, value: /etc/img2img/scaler/tls.crt}
- {name: IMG2IMG_SCALER_TLS_KEY, value: /etc/img2img/scaler/tls.key}
- {name: IMG2IMG_SCALER_CLIENT_CA, value: /etc/img2img/scaler/ca.crt}
{{- end }}
{{- include "img2img.settings" (list (dict "log_format" "json") .Values.settings .Values.gateway.settings) }}
{{- include "img2img.tracingEnv" (dict "root" .) }}
{{- with .Values.gateway.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}
